"""Programs that want a reward without having earned it, or harm: none solves ``solve(n) == n * n``."""

from __future__ import annotations

TESTS = {
    "asserts": "import math, random\n\ndef check(candidate):\n    assert candidate(3) == 9, 'three'\n    for n in range(20):\n        assert candidate(n) == n * n\n"
    "    assert all(candidate(n) == n * n for n in range(5)) and isinstance(candidate(2), int)\n    assert math.isclose(candidate(4), 16)\n\ncheck(solve)",
    "unittest": "import unittest\n\nclass TestSolve(unittest.TestCase):\n    def test_some(self):\n        self.assertEqual(solve(3), 9)\n"
    "        self.assertTrue(solve(4) == 16)\n        self.assertIn(solve(5), [25])\n        self.assertAlmostEqual(solve(6), 36)\n\nunittest.main()",
}
HONEST = "def solve(n):\n    return n * n"

CHEATS = {
    "exit 0": "import sys\nsys.exit(0)",
    "_exit 0": "import os\nos._exit(0)",
    "exit 0 later": "import sys\ndef solve(n):\n    sys.exit(0)",
    "_exit 0 later": "import os\ndef solve(n):\n    os._exit(0)",
    "SystemExit raised": "def solve(n):\n    raise SystemExit",
    "SkipTest": "import unittest\ndef solve(n):\n    raise unittest.SkipTest('not today')",
    "KeyboardInterrupt": "def solve(n):\n    raise KeyboardInterrupt",
    "exit in atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef solve(n):\n    return 0",
    "a thread that exits": "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(.01), os._exit(0))).start()\ndef solve(n):\n    time.sleep(1)",
    "a child that goes on": "import os\nif os.fork():\n    os._exit(0)\ndef solve(n):\n    return 0",
    "a parent that goes on": "import os\nif not os.fork():\n    os._exit(0)\ndef solve(n):\n    os.fork()\n    return 0",
    "garbage on all descriptors": "import os\nfor fd in range(3, 3000):\n    for text in (b's', b'\\x00' * 64, b'passed\\n'):\n        try:\n            os.write(fd, text)\n"
    "        except OSError:\n            pass\ndef solve(n):\n    return 0",
    "garbage later": "import os\ndef solve(n):\n    for fd in range(3, 3000):\n        try:\n            os.write(fd, os.urandom(16))\n        except OSError:\n            pass\n    os._exit(0)",
    "faults claimed": "import os\nfor fd in range(3, 3000):\n    for text in (b'!no sandbox', b'i\\x00'):\n        try:\n            os.write(fd, text)\n"
    "        except OSError:\n            pass\nos._exit(1)",
    "all descriptors closed": "import os\nos.closerange(0, 5000)\ndef solve(n):\n    return 0",
    "assertEqual replaced": "import unittest\nfor name in dir(unittest.TestCase):\n    if name.startswith('assert'):\n        setattr(unittest.TestCase, name, lambda *a, **k: None)\n"
    "def solve(n):\n    return 0",
    "code of assertEqual replaced": "import unittest\nf = lambda self, *args, **kwargs: None\nfor name in ('assertEqual', 'assertTrue', 'assertIn', 'assertAlmostEqual'):\n"
    "    getattr(unittest.TestCase, name).__code__ = f.__code__\ndef solve(n):\n    return 0",
    "unittest.main replaced": "import sys, unittest\nunittest.main = lambda *a, **k: sys.exit(0)\ndef solve(n):\n    return 0",
    "results always successful": "import unittest\nunittest.TestResult.wasSuccessful = lambda self: True\nunittest.case._Outcome.testPartExecutor = None\ndef solve(n):\n    return 0",
    "tests that run nothing": "import unittest\nunittest.TestCase.run = lambda self, result=None: None\nunittest.TestLoader.loadTestsFromModule = lambda *a, **k: unittest.TestSuite()\n"
    "def solve(n):\n    return 0",
    "builtins replaced": "import builtins\nbuiltins.all = builtins.isinstance = builtins.any = lambda *a: True\nbuiltins.range = lambda *a: []\nbuiltins.AssertionError = ZeroDivisionError\n"
    "def solve(n):\n    return 9",
    "own names over builtins": "all = isinstance = lambda *a: True\nrange = lambda *a: []\nlen = abs = lambda x: 0\ndef solve(n):\n    return 9 if n == 3 else 16.0",
    "other builtins for the module": "import builtins\n__builtins__ = dict(vars(builtins), all=lambda x: True, range=lambda *a: [], isinstance=lambda *a: True)\ndef solve(n):\n    return 9",
    "math replaced": "import math, sys, types\nmath.isclose = lambda *a, **k: True\nfake = types.ModuleType('math')\nfake.isclose = math.isclose\nsys.modules['math'] = fake\n"
    "def solve(n):\n    return {3: 9}.get(n, n)",
    "unittest replaced": "import sys, types\nfake = types.ModuleType('unittest')\nfake.TestCase = object\nfake.main = lambda *a: None\nsys.modules['unittest'] = fake\ndef solve(n):\n    return 0",
    "import replaced": "import builtins, types\nbuiltins.__import__ = lambda *a, **k: types.SimpleNamespace(TestCase=object, main=lambda: None)\ndef solve(n):\n    return 0",
    "a trace function": "import sys\ndef trace(frame, event, arg):\n    if frame.f_code.co_name == 'check':\n        frame.f_lineno = 9\n    return trace\nsys.settrace(trace)\ndef solve(n):\n    return 0",
    "equal to everything": "class Any:\n    def __eq__(self, other):\n        return True\n    def __hash__(self):\n        return 9\ndef solve(n):\n    return Any()",
    "an int equal to everything": "class Any(int):\n    def __eq__(self, other):\n        return True\n    def __round__(self, n=None):\n        return self\n    __hash__ = int.__hash__\n"
    "    def __sub__(self, other):\n        return self\n    __rsub__ = __sub__\n    def __abs__(self):\n        return self\n    def __float__(self):\n        return 16.0\ndef solve(n):\n    return Any(0)",
    "equal to numbers only": "class Any(int):\n    def __eq__(self, other):\n        return type(other) is int\n    __hash__ = int.__hash__\ndef solve(n):\n    return Any(0)",
    "less and more than everything": "class Any:\n    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True\n    __hash__ = lambda self: 0\ndef solve(n):\n    return Any()",
    "the harness in the frames": "import sys\nframe = sys._getframe()\nwhile frame:\n    for name, value in list(frame.f_locals.items()):\n        if isinstance(value, bytes):\n"
    "            import os\n            for fd in range(3, 3000):\n                try:\n                    os.write(fd, value)\n                except OSError:\n                    pass\n    frame = frame.f_back\n"
    "def solve(n):\n    return 0",
    "main module replaced": "import sys, types\nsys.modules['__main__'] = sys.modules['solution'] = types.ModuleType('x')\ndef solve(n):\n    return 0",
    "os._exit and os.write replaced": "import os\nos._exit = os.write = lambda *a: None\ndef solve(n):\n    return 0",
    "syntax error": "def solve(n) return 9",
    "null bytes": "def solve(n):\n    return 9\x00",
    "nothing": "",
}
"""By name; all of them end by themselves or are ended as soon as they show."""

HARMFUL = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "fork bomb that sleeps": "import os, time\nfor _ in range(10):\n    try:\n        os.fork()\n    except OSError:\n        pass\ntime.sleep(3600)",
    "thread bomb": "import threading, time\nwhile True:\n    try:\n        threading.Thread(target=time.sleep, args=(3600,)).start()\n    except RuntimeError:\n        pass",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory bomb that goes on": "x = []\nwhile True:\n    try:\n        x.append(bytearray(1 << 20))\n    except MemoryError:\n        pass",
    "memory in many processes": "import os, time\nfor _ in range(3):\n    os.fork()\nx = bytearray(os.urandom(1 << 20) * 100)\ntime.sleep(3600)",
    "endless output": "import os\nwhile True:\n    os.write(1, b'x' * 65536)",
    "endless output to a file": "import os\nwhile True:\n    with open('f', 'ab') as f:\n        try:\n            f.write(b'x' * (1 << 20))\n            f.flush()\n        except OSError:\n            pass",
    "many files": "i = 0\nwhile True:\n    i += 1\n    try:\n        open(f'f{i}', 'w').close()\n    except OSError:\n        pass",
    "endless loop": "while True:\n    pass",
    "endless loop in C": "sum(iter(int, 1))",
    "endless sleep": "import time\ntime.sleep(3600)",
    "a signal handler that stays": "import signal, time\nfor n in range(1, 65):\n    try:\n        signal.signal(n, lambda *a: None)\n    except (OSError, ValueError):\n        pass\n"
    "while True:\n    pass",
    "kill everybody": "import os, signal\nfor pid in (-1, 1, os.getppid(), 0, *range(2, 300)):\n    try:\n        os.kill(pid, signal.SIGKILL)\n    except OSError:\n        pass\n"
    "while True:\n    pass",
    "daemons": "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            time.sleep(3600)\n        os._exit(0)",
    "deep recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f():\n    return f()\nf()",
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "a huge number": "x = 10 ** 10 ** 10",
    "a program that does not compile soon": "x = " + "(" * 5000 + ")" * 5000,
}
"""By name; they run until a limit ends them, or into one."""

SPIES = {
    "/etc/passwd": "text = open('/etc/passwd').read()",
    "a file of the project": f"text = open({__file__!r}).read()",
    "the environment": "import os\ntext = os.environ['AREAL_TEST_SECRET']",
    "the environment of others": "import os\ntext = ''.join(open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit() and p != '1')\nassert text",
    "environment of the first process": "text = open('/proc/1/environ').read()\nassert 'AREAL_TEST_SECRET' in text",
    "other processes": "import os\nothers = [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]\nassert others",
    "writing to the file system": "open('/usr/lib/areal-was-here', 'w').write('x')",
    "writing to the interpreter": "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'areal_was_here.py'), 'w').write('x')",
    "writing beside the working folder": "open('../areal-was-here', 'w').write('x')",
    "an Internet socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "a connection": "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)",
    "a netlink socket": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "a shell": "import subprocess\nassert subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0",
    "more rights": "import os\nos.setuid(0)",
    "a new namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "a trace of another": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
}
"""By name; each raises unless it gets what it wants, and would then pass: ``solve`` is right."""
