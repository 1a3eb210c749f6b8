"""``pdspec study run`` and ``report``: a grid of cells, each measured once and kept, and the page about them."""
