"""Real images, the seal that keeps data-free code away from them, and augmentation."""
