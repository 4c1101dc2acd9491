//! Three coordinators over one PostgreSQL and one bucket, killed while everybody works; `make replicas` is the same
//! for half an hour.

use std::time::Duration;

use cairn_tests::replicas::{Size, run};

#[tokio::test(flavor = "multi_thread")]
async fn three_coordinators_under_kill_9_lose_nothing_and_count_nothing_twice() {
    let Ok(url) = std::env::var("CAIRN_TEST_POSTGRES") else {
        eprintln!("left out: CAIRN_TEST_POSTGRES names no server");
        return;
    };
    let size = Size {
        replicas: 3,
        rounds: 3,
        rounds_at_once: 3,
        shards: 10,
        volunteers: 8,
        copies: 1,
        evaluators: 2,
        kill_every: Duration::from_secs(2),
        bucket: true,
    };
    let folder = tempfile::tempdir().unwrap();
    let report = run(&size, &url, folder.path()).await.unwrap();
    println!("{}", report.text());
    assert!(report.is_good(), "{report:?}");
    assert!(
        report.direct_puts.is_some_and(|puts| puts > 0),
        "{report:?}"
    );
    assert!(report.kills > 0 && report.submissions >= 30, "{report:?}");
}
