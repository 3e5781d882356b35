"""The page of two runs side by side: the same images, joined on uid, with both runs' scores and captions."""
