"""Everything that learns or optimises is a LightningModule whose training step is one whole round.

One Lightning epoch is one round is one ``training_step``; inside it runs a loop of ours over many inner steps, so that
Lightning's cost per step does not show, and its checkpoints fall between rounds. Random state is derived from the seed
and the step, never saved: a run that was killed and continued is the run that was not.
"""
