"""The table of what holds in each engine is green, and would not be if something did not hold"""
import json, sys
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent/'conformance'))
import table

@pytest.mark.parametrize('technique', table.ARGS)
@pytest.mark.parametrize('engine', table.ENGINES)
@pytest.mark.parametrize('scenario', table.SCENARIOS)
def test_holds(scenario, engine, technique): table.cell(scenario, engine, technique)

def test_two_processes(): assert not {k:v for k,v in table.run_two().items() if v}

def test_a_breach_is_noticed(monkeypatch, tmp_path):
    "Masks that are not held, and a state that is lost"
    from fasterai.sparse.sparsifier import Sparsifier
    from fasterai.sparse.training import Sparsify
    with monkeypatch.context() as m:
        m.setattr(Sparsifier, 'apply_masks', lambda self: None)
        with pytest.raises(AssertionError): table.cell('exact after each step', 'lightning', 'sparsify')
    monkeypatch.setattr(Sparsify, 'load_state_dict', lambda self, state: None)
    with pytest.raises(AssertionError, match='other bits than without a stop'): table.cell('stop, save, go on', 'lightning', 'sparsify')

def test_the_table_that_is_shown_is_this_one():
    "The documentation shows what comes of it if all of the above holds"
    green = {(s,e,t):'' for s in (*table.SCENARIOS, table.TWO) for e in table.ENGINES for t in table.ARGS}
    nb = json.loads(table.NOTEBOOK.read_text(encoding='utf-8'))
    assert ''.join(table.shown_in(nb)['source'])==table.table(green)
