from .granularity import *
from .criteria import *
from .schedule import *
from .selection import *
from .context import *
from .graph import *
from .liveness import *
from .surgery import *
