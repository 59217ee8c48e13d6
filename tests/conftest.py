"Hypothesis repeats itself from run to run; `pytest --hypothesis-profile=hunt` looks further"
from hypothesis import HealthCheck, settings

quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile('same', derandomize=True, max_examples=60, **quiet)
settings.register_profile('hunt', max_examples=1000, print_blob=True, **quiet)
settings.load_profile('same')
