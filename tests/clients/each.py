"""each.py MODULE: runs the module's functions named test_*, one line each and a line that counts them."""
import importlib
import sys
import time
import traceback

module = importlib.import_module(sys.argv[1])
passed = failed = 0
for name, test in list(vars(module).items()):
    if not name.startswith("test_"):
        continue
    start = time.monotonic()
    try:
        test()
        passed += 1
        print(f"ok     {name} ({time.monotonic() - start:.1f} s)", flush=True)
    except Exception:
        failed += 1
        print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
print(f"{passed} passed, {failed} failed, 0 skipped")
