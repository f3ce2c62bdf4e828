"""Files that `evlgen export --transformers` puts into a bundle: with them, plain transformers loads it.

The modules here import neither this package nor LAVIS, since they run without both.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CODE = ("configuration_evlgen.py", "connector_evlgen.py", "modeling_evlgen.py", "processing_evlgen.py")
VISION_MODEL, LANGUAGE_MODEL = "vision_model", "language_model"  # folders, of frozen parts that have no public name
PROCESSOR, IMAGE_PROCESSOR, GENERATION = "processor_config.json", "preprocessor_config.json", "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")  # fmt: skip
FILES = (*CODE, PROCESSOR, IMAGE_PROCESSOR, GENERATION, *TOKENIZER, VISION_MODEL, LANGUAGE_MODEL)
