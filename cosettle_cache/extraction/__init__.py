"""Stage one: videos and a frozen encoder in, a store of patch tokens out."""
