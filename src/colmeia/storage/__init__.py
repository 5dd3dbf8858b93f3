"""Where bytes live: images, volumes, seeds and the building of images. Hands out `BlockSource` values."""
