"""Settings of pictures that released weights read, and a run's own sampler does not."""

# Of pictures to change: a run paints from text alone.
EDITED = (
    *("image", "images", "mask", "strength", "resize"),
    *("paste", "mask_blur", "mask_padding", "crop_to_mask", "outpaint"),
)
SKIPPED = ("skip_layers", "skip_scale", "skip_start", "skip_stop")
RELEASED = (*EDITED, "lora", "max_length", "clip_skip", "placement", *SKIPPED)
