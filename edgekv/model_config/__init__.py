"""The one reader of Hugging Face model configurations: for export, plan, emulator and memory manager alike.

Invariant: a configuration means here what it means to transformers, left-out keys included, or it is refused in one line that
names the key.
"""

from edgekv.model_config.architectures import ARCHITECTURES as ARCHITECTURES
from edgekv.model_config.architectures import TEXT_PARTS as TEXT_PARTS
from edgekv.model_config.architectures import NormKind as NormKind
from edgekv.model_config.architectures import Norms as Norms
from edgekv.model_config.architectures import QKNorms as QKNorms
from edgekv.model_config.cache_shape import CacheShape as CacheShape
from edgekv.model_config.cache_shape import read_cache_shape as read_cache_shape
from edgekv.model_config.decoder import ModelConfig as ModelConfig
from edgekv.model_config.decoder import read_model_config as read_model_config
from edgekv.model_config.rope import RopeSettings as RopeSettings
from edgekv.model_config.values import Values as Values
from edgekv.model_config.values import read_json_object as read_json_object
from edgekv.model_config.values import text_part as text_part
