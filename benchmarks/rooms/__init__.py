"""The rendered data set: furnished rooms, ray-cast, with exact labels (``scenes``), and pictures of them."""
