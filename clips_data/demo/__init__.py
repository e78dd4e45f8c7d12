"""The demo world: scenes that know their truth, served over HTTP, and the small captioner trained on them."""
