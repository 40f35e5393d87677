from dataclasses import dataclass
ACTIVATIONS = {}
@dataclass(frozen=True)
class Clip:
    lo: float
    hi: float
def parse(spec): return None, ()
