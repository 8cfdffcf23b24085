"""Methods that turn a frozen teacher into data impressions: one file each."""
