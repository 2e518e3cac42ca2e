from configs.base import get_config as base
def get_config():
    return base()
