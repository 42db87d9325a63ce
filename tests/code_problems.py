"""Call-based problems of the usual kinds, each with a correct solution and broken ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    name: str
    right: str
    wrong: tuple[str, ...]
    tests: str


def _of(name: str, right: str, tests: str, *wrong: str) -> Problem:
    return Problem(name, right, wrong, tests)


PROBLEMS = (
    _of(
        "gcd by recursion",
        "def gcd(a, b):\n    return a if b == 0 else gcd(b, a % b)",
        "assert gcd(12, 18) == 6\nassert gcd(7, 5) == 1\nassert gcd(0, 9) == 9",
        "def gcd(a, b):\n    return min(a, b)",
        "def gcd(a, b):\n    return gcd(b, a)",
    ),
    _of(
        "balanced brackets",
        "def balanced(s):\n    pairs = {')': '(', ']': '[', '}': '{'}\n    stack = []\n    for c in s:\n        if c in pairs.values():\n"
        "            stack.append(c)\n        elif c in pairs:\n            if not stack or stack.pop() != pairs[c]:\n                return False\n"
        "    return not stack",
        "assert balanced('([]{})')\nassert not balanced('([)]')\nassert not balanced('((')\nassert balanced('')",
        "def balanced(s):\n    return s.count('(') == s.count(')')",
        "def balanced(s):\n    return True",
    ),
    _of(
        "two sum",
        "from typing import List\n\nclass Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n"
        "        for i, x in enumerate(nums):\n            if target - x in seen:\n                return [seen[target - x], i]\n            seen[x] = i\n"
        "        return []",
        "s = Solution()\nassert s.twoSum([2, 7, 11, 15], 9) == [0, 1]\nassert s.twoSum([3, 3], 6) == [0, 1]\nassert s.twoSum([1], 2) == []",
        "class Solution:\n    def twoSum(self, nums, target):\n        return [0, 1]",
    ),
    _of(
        "longest common subsequence, memoised and deep",
        "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10**6)\n\ndef lcs(a, b):\n    @lru_cache(maxsize=None)\n    def go(i, j):\n"
        "        if i == len(a) or j == len(b):\n            return 0\n        if a[i] == b[j]:\n            return 1 + go(i + 1, j + 1)\n"
        "        return max(go(i + 1, j), go(i, j + 1))\n    return go(0, 0)",
        "assert lcs('abcde', 'ace') == 3\nassert lcs('abc', 'def') == 0\nassert lcs('x' * 1500, 'x' * 1500) == 1500",
        "def lcs(a, b):\n    return len(set(a) & set(b))",
        "def lcs(a, b):\n    return 0 if not a or not b else (1 + lcs(a[1:], b[1:]) if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:])))",
    ),
    _of(
        "primes by a generator",
        "def primes():\n    n, found = 2, []\n    while True:\n        if all(n % p for p in found):\n            found.append(n)\n            yield n\n        n += 1",
        "from itertools import islice\nassert list(islice(primes(), 6)) == [2, 3, 5, 7, 11, 13]",
        "def primes():\n    yield from [2, 3, 5, 7, 9, 11]",
    ),
    _of(
        "a dataclass with order",
        "from dataclasses import dataclass, field\n\n@dataclass(order=True)\nclass Task:\n    priority: int\n    name: str = field(compare=False)\n\n"
        "def first(tasks):\n    return min(tasks).name",
        "assert first([Task(3, 'c'), Task(1, 'a'), Task(2, 'b')]) == 'a'\nassert Task(1, 'x') == Task(1, 'y')",
        "from dataclasses import dataclass\n\n@dataclass\nclass Task:\n    priority: int\n    name: str\n\ndef first(tasks):\n    return tasks[0].name",
    ),
    _of(
        "own equality",
        "class Vec:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n    def __eq__(self, other):\n"
        "        return isinstance(other, Vec) and (self.x, self.y) == (other.x, other.y)\n    def __hash__(self):\n        return hash((self.x, self.y))\n"
        "    def __add__(self, other):\n        return Vec(self.x + other.x, self.y + other.y)",
        "assert Vec(1, 2) + Vec(3, 4) == Vec(4, 6)\nassert Vec(1, 2) != Vec(2, 1)\nassert len({Vec(0, 0), Vec(0, 0)}) == 1",
        "class Vec:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n    def __add__(self, other):\n        return Vec(self.x, other.y)",
        "class Vec:\n    def __init__(self, x, y):\n        pass\n    def __eq__(self, other):\n        return True\n    def __ne__(self, other):\n        return True\n"
        "    def __hash__(self):\n        return 1\n    def __add__(self, other):\n        return self",
    ),
    _of(
        "equality that trusts its other side",
        "class Money:\n    def __init__(self, cents):\n        self.cents = cents\n    def __eq__(self, other):\n        return self.cents == other.cents\n"
        "    def __lt__(self, other):\n        return self.cents < other.cents",
        "assert Money(5) == Money(5) and not Money(5) == Money(6)\nassert [m.cents for m in sorted([Money(3), Money(1)])] == [1, 3]",
        "class Money:\n    def __init__(self, cents):\n        self.cents = cents",
    ),
    _of(
        "unittest",
        "def fizz(n):\n    return 'FizzBuzz' if n % 15 == 0 else 'Fizz' if n % 3 == 0 else 'Buzz' if n % 5 == 0 else str(n)",
        "import unittest\n\nclass TestFizz(unittest.TestCase):\n    def test_all(self):\n        self.assertEqual([fizz(n) for n in (1, 3, 5, 15)], "
        "['1', 'Fizz', 'Buzz', 'FizzBuzz'])\n    def test_raises(self):\n        with self.assertRaises(TypeError):\n            fizz(None)\n\n"
        "if __name__ == '__main__':\n    unittest.main()",
        "def fizz(n):\n    return str(n)",
        "def fizz(n):\n    return ['1', 'Fizz', 'Buzz', 'FizzBuzz'][[1, 3, 5, 15].index(n)]",
    ),
    _of(
        "HumanEval's check",
        "def truncate_number(number: float) -> float:\n    return number % 1.0",
        "METADATA = {}\n\ndef check(candidate):\n    assert candidate(3.5) == 0.5\n    assert abs(candidate(1.33) - 0.33) < 1e-6\n\ncheck(truncate_number)",
        "def truncate_number(number):\n    return int(number)",
    ),
    _of(
        "MBPP: a function with the name of a builtin",
        "def sum(a, b):\n    return [n for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0] and __import__('builtins').sum("
        "n for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0)",
        "assert sum(10, 15) == 6\nassert sum(100, 150) == 93\nassert sum(4, 6) == 3",
        "def sum(a, b):\n    return a + b",
    ),
    _of(
        "own names over builtins that are no business of the tests",
        "def solve(n):\n    max = 0\n    list = [int(d) for d in str(n)]\n    for d in list:\n        max = d if d > max else max\n    return max\n\nsum = solve(12)",
        "assert solve(1973) == 9\nassert max(map(solve, range(10))) == 9 and sum([solve(1), solve(2)]) == 3",
        "def solve(n):\n    return n % 10",
    ),
    _of(
        "top k with a heap",
        "import heapq\nfrom collections import Counter\n\ndef top(words, k):\n    counts = Counter(words)\n"
        "    return heapq.nsmallest(k, counts, key=lambda w: (-counts[w], w))",
        "assert top(['b', 'a', 'b', 'c', 'a', 'b'], 2) == ['b', 'a']\nassert top(['z', 'y'], 1) == ['y']",
        "from collections import Counter\n\ndef top(words, k):\n    return [w for w, _ in Counter(words).most_common(k)]",
    ),
    _of(
        "LRU cache class",
        "from collections import OrderedDict\n\nclass LRUCache:\n    def __init__(self, capacity):\n        self.capacity, self.data = capacity, OrderedDict()\n"
        "    def get(self, key):\n        if key not in self.data:\n            return -1\n        self.data.move_to_end(key)\n        return self.data[key]\n"
        "    def put(self, key, value):\n        self.data[key] = value\n        self.data.move_to_end(key)\n        if len(self.data) > self.capacity:\n"
        "            self.data.popitem(last=False)",
        "c = LRUCache(2)\nc.put(1, 1)\nc.put(2, 2)\nassert c.get(1) == 1\nc.put(3, 3)\nassert c.get(2) == -1\nassert c.get(3) == 3",
        "class LRUCache:\n    def __init__(self, capacity):\n        self.data = {}\n    def get(self, key):\n        return self.data.get(key, -1)\n"
        "    def put(self, key, value):\n        self.data[key] = value",
    ),
    _of(
        "linked list",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n\ndef reverse(node):\n    before = None\n"
        "    while node:\n        node.next, before, node = before, node, node.next\n    return before",
        "n = reverse(Node(1, Node(2, Node(3))))\nvalues = []\nwhile n:\n    values.append(n.value)\n    n = n.next\nassert values == [3, 2, 1], values",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n\ndef reverse(node):\n    return node",
    ),
    _of(
        "shortest paths",
        "import heapq\n\ndef dijkstra(graph, start):\n    best, queue = {}, [(0, start)]\n    while queue:\n        cost, node = heapq.heappop(queue)\n"
        "        if node in best:\n            continue\n        best[node] = cost\n        for other, weight in graph.get(node, {}).items():\n"
        "            heapq.heappush(queue, (cost + weight, other))\n    return best",
        "assert dijkstra({'a': {'b': 1, 'c': 5}, 'b': {'c': 1}}, 'a') == {'a': 0, 'b': 1, 'c': 2}",
        "def dijkstra(graph, start):\n    return {'a': 0, 'b': 1, 'c': 5}",
    ),
    _of(
        "n queens by backtracking",
        "def queens(n):\n    def place(row, cols, up, down):\n        if row == n:\n            return 1\n        return sum(place(row + 1, cols | {c}, up | {row + c}, down | {row - c})\n"
        "                   for c in range(n) if c not in cols and row + c not in up and row - c not in down)\n    return place(0, set(), set(), set())",
        "assert [queens(n) for n in range(1, 8)] == [1, 0, 0, 2, 10, 4, 40]",
        "def queens(n):\n    return n",
    ),
    _of(
        "decimals and fractions",
        "from decimal import Decimal\nfrom fractions import Fraction\n\ndef half(x):\n    return Decimal(x) / 2, Fraction(x) / 2",
        "from decimal import Decimal\nfrom fractions import Fraction\nassert half('0.3') == (Decimal('0.15'), Fraction(3, 20))",
        "def half(x):\n    return float(x) / 2, float(x) / 2",
    ),
    _of(
        "floats nearly equal",
        "import math\n\ndef area(r):\n    return math.pi * r ** 2",
        "import math\nassert math.isclose(area(2), 12.566370614359172)\nassert abs(area(1) - 3.14159) < 1e-3",
        "def area(r):\n    return 3 * r * r",
    ),
    _of(
        "threads",
        "import threading\n\ndef count(n):\n    lock, total = threading.Lock(), [0]\n    def work():\n        for _ in range(100):\n            with lock:\n"
        "                total[0] += 1\n    threads = [threading.Thread(target=work) for _ in range(n)]\n    for t in threads:\n        t.start()\n"
        "    for t in threads:\n        t.join()\n    return total[0]",
        "assert count(8) == 800",
        "def count(n):\n    return n",
    ),
    _of(
        "a big stack in a thread",
        "import sys\nimport threading\nsys.setrecursionlimit(1 << 20)\nthreading.stack_size(1 << 27)\n\ndef depth(n):\n    answer = []\n    def down(k):\n"
        "        return 0 if k == 0 else 1 + down(k - 1)\n    t = threading.Thread(target=lambda: answer.append(down(n)))\n    t.start()\n    t.join()\n    return answer[0]",
        "assert depth(50_000) == 50_000",
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)",
    ),
    _of(
        "asyncio",
        "import asyncio\n\nasync def twice(x):\n    await asyncio.sleep(0)\n    return 2 * x\n\ndef run(xs):\n    async def main():\n"
        "        return await asyncio.gather(*map(twice, xs))\n    return asyncio.run(main())",
        "assert run([1, 2, 3]) == [2, 4, 6]",
        "async def twice(x):\n    return 2 * x\n\ndef run(xs):\n    return [twice(x) for x in xs]",
    ),
    _of(
        "prints beside returning, captured by the test",
        "def greet(name):\n    print(f'Hello, {name}!')\n    return len(name)",
        "import contextlib, io\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    assert greet('Ada') == 3\nassert out.getvalue() == 'Hello, Ada!\\n'",
        "def greet(name):\n    print('Hello')\n    return len(name)",
    ),
    _of(
        "input, replaced by the test",
        "def total():\n    return sum(int(input()) for _ in range(int(input())))",
        "from unittest.mock import patch\nwith patch('builtins.input', side_effect=['2', '3', '4']):\n    assert total() == 7",
        "def total():\n    return int(input())",
    ),
    _of(
        "a mock that equals anything, the test's own",
        "def call(f):\n    return f(1, key='x')",
        "from unittest.mock import ANY, Mock\nm = Mock(return_value=5)\nassert call(m) == 5\nm.assert_called_once_with(1, key=ANY)\nassert [ANY] == [call(m)]",
        "def call(f):\n    return 5",
    ),
    _of(
        "a main block that reads stdin",
        "def double(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    print(double(int(input())))",
        "assert double(21) == 42",
        "def double(x):\n    return x\n\nif __name__ == '__main__':\n    print(double(int(input())))",
    ),
    _of(
        "pickle, types and annotations",
        "from typing import NamedTuple, get_type_hints\nimport enum\nimport pickle\n\nclass Colour(enum.Enum):\n    RED = 1\n\nclass P(NamedTuple):\n    x: int\n"
        "    c: 'Colour' = Colour.RED\n\ndef copy_of(p):\n    return pickle.loads(pickle.dumps(p))",
        "from typing import get_type_hints\nassert copy_of(P(3)) == P(3, Colour.RED)\nassert get_type_hints(P) == {'x': int, 'c': Colour}",
        "from typing import NamedTuple\nColour = None\nclass P(NamedTuple):\n    x: int\n\ndef copy_of(p):\n    return p",
    ),
    _of(
        "random, seeded by the test",
        "import random\n\ndef shuffled(xs):\n    xs = xs[:]\n    random.shuffle(xs)\n    return xs",
        "import random\nrandom.seed(5)\na = shuffled(list(range(20)))\nrandom.seed(5)\nassert a == shuffled(list(range(20))) and a != sorted(a) == list(range(20))",
        "def shuffled(xs):\n    return xs[::-1] if len(xs) < 5 else xs",
    ),
    _of(
        "files in the working folder",
        "import os, tempfile\n\ndef save(text):\n    with open('out.txt', 'w') as f:\n        f.write(text)\n    with tempfile.NamedTemporaryFile('w') as f:\n"
        "        f.write(text)\n    return os.path.getsize('out.txt')",
        "assert save('abc') == 3\nassert open('out.txt').read() == 'abc'",
        "def save(text):\n    return 3",
    ),
    _of(
        "raising as asked",
        "def parse(s):\n    if not s.isdigit():\n        raise ValueError(f'no number: {s}')\n    return int(s)",
        "assert parse('12') == 12\ntry:\n    parse('x')\nexcept ValueError as error:\n    assert 'x' in str(error)\nelse:\n    raise AssertionError('no error')",
        "def parse(s):\n    return int(s) if s.isdigit() else 0",
    ),
    _of(
        "a test without assert",
        "def rotate(m):\n    return [list(r) for r in zip(*m[::-1])]",
        "import sys\n\ndef main():\n    if rotate([[1, 2], [3, 4]]) != [[3, 1], [4, 2]]:\n        raise RuntimeError('wrong')\n    return 0\n\nif __name__ == '__main__':\n    sys.exit(main())",
        "def rotate(m):\n    return m",
    ),
    _of(
        "regular expressions",
        "import re\n\ndef emails(text):\n    return re.findall(r'[\\w.]+@[\\w.]+\\w', text)",
        "assert emails('a.b@c.de, x@y.z.') == ['a.b@c.de', 'x@y.z']",
        "def emails(text):\n    return text.split(', ')",
    ),
    _of(
        "dates",
        "from datetime import date, timedelta\n\ndef days(a, b):\n    return (date.fromisoformat(b) - date.fromisoformat(a)).days",
        "assert days('2024-02-28', '2024-03-01') == 2",
        "def days(a, b):\n    return int(b[-2:]) - int(a[-2:])",
    ),
    _of(
        "large lists compared",
        "def squares(n):\n    return [i * i for i in range(n)]",
        "assert squares(200_000) == [i ** 2 for i in range(200_000)]\nassert {1: [(2, {3})]} == {1: [(2, {3})]}",
        "def squares(n):\n    return [i * 2 for i in range(n)]",
    ),
)
