"""Logical names of parameter and activation axes; a config's `rules` maps them to the mesh.

Flax replicates an axis whose name it does not know without a word, so names are used through these
constants only, and `training.sharding` refuses a name that the rules lack.
"""

BATCH = "batch"  # examples
RESIDUAL = "residual"  # examples between the products of a T5; where there is no such rule, as BATCH
TOKENS = "tokens"  # image tokens of an example
TEXT = "text"  # text positions of an example
EMBED = "embed"  # transformer width
NORM = "norm"  # scale of a norm
MLP = "mlp"  # hidden width of an MLP
HEADS = "heads"
HEAD_DIM = "head_dim"
VOCAB = "vocab"  # codebook or text vocabulary
LAYERS = "layers"  # stacked, scanned layers
POSITIONS = "positions"  # learned position table
BUCKETS = "buckets"  # relative position buckets
CODE = "code"  # dimension of a code
ROWS = "rows"  # of a convolution's kernel
COLUMNS = "columns"
CHANNELS_IN = "channels_in"
CHANNELS_OUT = "channels_out"

ALL = tuple(value for name, value in sorted(globals().items()) if name.isupper() and isinstance(value, str))
