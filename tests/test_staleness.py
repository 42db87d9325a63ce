from areal.staleness import StalenessManager


def test_capacity_is_the_papers_formula() -> None:
    manager = StalenessManager(batch_size=4, eta=2, max_concurrent=1000)
    assert manager.capacity(0) == 12
    for _ in range(12):
        manager.admit()
    assert manager.capacity(0) == 0
    assert manager.capacity(1) == 4
    # the paper's admission test: floor((N_r - 1) / B) <= i + eta for the next sample to be admitted
    for version in range(5):
        for n_r in range(0, 40):
            m = StalenessManager(4, 2, 1000)
            m.n_accepted = n_r
            assert (m.capacity(version) > 0) == (n_r // 4 <= version + 2)


def test_rejected_groups_give_their_slot_back_and_accepted_ones_do_not() -> None:
    manager = StalenessManager(batch_size=1, eta=0, max_concurrent=8)
    manager.admit()
    assert manager.capacity(0) == 0
    manager.finish_rejected()
    assert manager.capacity(0) == 1
    manager.admit()
    manager.finish_accepted()
    assert manager.capacity(0) == 0
    assert manager.capacity(1) == 1


def test_concurrency_limits_running_groups_only() -> None:
    manager = StalenessManager(batch_size=8, eta=8, max_concurrent=3)
    for _ in range(3):
        manager.admit()
    assert manager.capacity(0) == 0
    manager.finish_accepted()
    assert manager.capacity(0) == 1


def test_resume_counts_what_was_trained_and_what_is_buffered() -> None:
    manager = StalenessManager(batch_size=4, eta=1, max_concurrent=100)
    manager.resume(version=10, n_buffered=3)
    assert manager.capacity(10) == (1 + 10 + 1) * 4 - 43


def test_nothing_is_started_beyond_the_last_batch() -> None:
    manager = StalenessManager(batch_size=4, eta=2, max_concurrent=100, total_batches=2)
    assert manager.capacity(0) == 8
    assert manager.capacity(10) == 8
