import os

# Before transformers is imported: no test may look anything up.
os.environ["HF_HUB_OFFLINE"] = "1"
