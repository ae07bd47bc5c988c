"""The simulation of docs/scale.md, and that the page has its figures."""

import runpy

from helpers.pages import DOCS, PAGES

SIMULATION = runpy.run_path(str(DOCS / "simulate_scale.py"))
Cluster, simulate, SCHEDULES = (SIMULATION[name] for name in ("Cluster", "simulate", "SCHEDULES"))

QUIET = {"slow_share": 0.0, "spread": 0.0, "start": 0.0, "commit": 0.0, "dispatch": 0.0}


def test_without_faults_all_schedules_take_the_ideal_time():
    cluster = Cluster(workers=10, images_per_second=1.0, hours_between_failures=1e9, **QUIET)
    for schedule in SCHEDULES:
        found = simulate(cluster, 1000, 10, schedule)
        assert abs(found.over_ideal) < 1e-9 and found.shards == 100
        assert (found.failures, found.lost, found.repeated) == (0, 0.0, 0.0)


def test_a_part_for_each_waits_for_the_slowest_and_a_queue_does_not():
    slow = Cluster(
        workers=20, images_per_second=1.0, hours_between_failures=1e9, **QUIET | {"slow_share": 0.1}
    )
    fixed, queue, copies = (simulate(slow, 20_000, 10, schedule, seed=1) for schedule in SCHEDULES)
    assert abs(fixed.over_ideal - 3.0) < 1e-9  # four times as long
    assert queue.over_ideal < 0.2
    assert copies.hours < queue.hours
    assert copies.repeated > 0 == queue.repeated


def test_larger_shards_lose_more_and_all_work_is_done_however_often_workers_are_killed():
    cluster = Cluster(workers=20, images_per_second=1.0, hours_between_failures=1.0)
    small, large = (simulate(cluster, 100_000, images) for images in (100, 1000))
    assert min(small.failures, large.failures) > 15
    # Of the shard at which a worker is killed, half is lost in the mean.
    for found, images in ((small, 100), (large, 1000)):
        expected = found.failures * images / 2 / 100_000
        assert 0.6 * expected < found.lost < 1.6 * expected


def test_the_page_has_the_figures_that_the_simulation_prints():
    """The rows that take a second; the others are printed by the same function."""
    page = PAGES["scale"]
    table, drivers = (SIMULATION[name] for name in ("table", "drivers_table"))
    rows = table(sizes=(100_000,)).splitlines()
    assert len(rows) == 2 + 6
    for row in [*rows, *drivers(counts=(1, 10)).splitlines()]:
        assert f"{row}\n" in page
