import importlib.resources
import pkgutil
import subprocess
import sys

import decathlon
import decathlon.shared


def test_decathlon_is_a_namespace_and_the_layer_is_typed():
    assert getattr(decathlon, "__file__", None) is None
    assert importlib.resources.files("decathlon.shared").joinpath("py.typed").is_file()


def test_the_layer_loads_no_torch_no_matplotlib_and_no_package():
    names = [f"decathlon.shared.{module.name}" for module in pkgutil.iter_modules(decathlon.shared.__path__)]
    assert len(names) >= 9
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert set(names) <= set(loaded)
    assert not {"torch", "matplotlib", "pandas", "sklearn"} & set(loaded)
    assert {name.split(".")[1] for name in loaded if name.startswith("decathlon.")} == {"shared"}
