"""Strong-to-weak distillation of Qwen3: one noun (Batch), one loop (train), one table of losses."""

import os

# transformers otherwise announces at import that torch is absent, which is the normal case here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
