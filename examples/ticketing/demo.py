from pathlib import Path

DEFAULT_PURCHASES = Path(__file__).with_name("purchases.jsonl")
