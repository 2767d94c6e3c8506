"""One small member of every module of timm that holds an attention."""

def names(): return []
