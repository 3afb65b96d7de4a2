def load_model(*a, **k): raise RuntimeError
