"""Black-box tests of the HTTP server:  python3 tests/http/run.py build/urchin [word ...]

Runs from the repository root.  Words choose tests whose names contain one of them.  One line a test,
and at the end `N passed, N failed, N skipped`; the exit status is 1 when any failed."""
import glob
import importlib
import os
import sys
import time
import traceback

import harness


def tests():
    for path in sorted(glob.glob(os.path.join(os.path.dirname(__file__), "test_*.py"))):
        module = importlib.import_module(os.path.basename(path)[:-3])
        for name, function in vars(module).items():
            if name.startswith("test_"):
                yield module, name, function


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    harness.use(sys.argv[1])
    words, counts = sys.argv[2:], {"passed": 0, "failed": 0, "skipped": 0}
    shared = None  # tests that take a server share one a module, with default settings
    for module, name, function in tests():
        if words and not any(w in name for w in words):
            continue
        start, result, detail = time.monotonic(), "passed", ""
        try:
            if function.__code__.co_argcount:
                if not shared or shared.process.poll() is not None or shared.module is not module:
                    if shared:
                        shared.__exit__()
                    shared = None
                    shared = harness.Server()
                    shared.module = module
                function(shared)
            else:
                function()
        except harness.Skip as reason:
            result, detail = "skipped", f": {reason}"
        except Exception:
            result, detail = "failed", "\n" + traceback.format_exc()
        counts[result] += 1
        print(f"{result:8}{module.__name__}.{name} ({time.monotonic() - start:.2f} s){detail}", flush=True)
    if shared:
        try:
            shared.__exit__()
        except Exception:
            counts["failed"] += 1
            print("failed  the shared server\n" + traceback.format_exc())
    print(", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
