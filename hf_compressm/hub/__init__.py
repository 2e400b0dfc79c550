from .environment import describe_environment


def keep_card(t):
    t.create_model_card = lambda *a, **k: None


def write_report(o):
    pass
