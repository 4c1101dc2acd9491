//! Several coordinators over one PostgreSQL, asked at the same moment, where `scripts/postgres.sh`
//! offers one; left out elsewhere. What one alone can show is in `rounds_on_postgres`.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;
#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod world;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use cairn_coordinator::app::App;
use cairn_coordinator::blobs::Location;
use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::clock::Clock;
use cairn_coordinator::db::coordinators::coordinator_living;
use cairn_coordinator::domain::lease::Work;
use cairn_coordinator::http;
use cairn_coordinator::ids::RequestId;
use cairn_coordinator::limits::{COORDINATOR_ALIVE, Limits};
use cairn_coordinator::ops::claim_work::claim_work;
use cairn_coordinator::ops::create_round::create_round;
use cairn_coordinator::ops::enroll::{NewEnrolment, enroll};
use cairn_coordinator::ops::read_log::{get_tree_head, list_entries};
use cairn_coordinator::ops::submit_adapter::{Acknowledged, submit_adapter};
use cairn_coordinator::ops::write_blob::{UploadHeader, query_write_status, write_blob};
use cairn_coordinator::server::{self, DataFolder, Options};
use cairn_coordinator::tasks;
use cairn_coordinator::tasks::collect_blobs::sweep_uploads;
use cairn_coordinator::tasks::share;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::{ReceiptStatement, TreeHeadStatement};
use cairn_stack::merkle::{leaf_hash, root};
use futures::future::join_all;
use support::{START, Stores};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use world::{World, new_adapter, round_text};

/// How many coordinators.
const REPLICAS: usize = 3;

/// Three coordinators: the world's own and two more over its database and its store.
struct Replicas {
    world: World,
    apps: Vec<App>,
    _folders: Vec<TempDir>,
}

async fn open(url: &str, store: Option<String>, folder: &TempDir, clock: Clock) -> App {
    server::open_idle(Options {
        data: DataFolder::lock(folder.path()).unwrap(),
        database_url: Some(url.to_owned()),
        blobs: store.map(Location::from_env),
        endpoint: "cairn+insecure://127.0.0.1:7600/#".parse().unwrap(),
        clock,
        limits: Limits {
            disk_free_bytes_min: 0,
            ..Limits::default()
        },
    })
    .await
    .unwrap()
}

impl Replicas {
    /// None where there is no PostgreSQL.
    async fn start() -> Option<Self> {
        let stores = Stores {
            postgres: true,
            s3: false,
        };
        if !stores.are_here() {
            return None;
        }
        let world = World::on(stores).await;
        let url = world.fixture.database_url.clone().unwrap();
        let store = world.fixture.folder.path().join("store");
        let store = store.to_str().unwrap().to_owned();
        let (mut apps, mut folders) = (vec![world.app().clone()], Vec::new());
        for _ in 1..REPLICAS {
            let folder = tempfile::tempdir().unwrap();
            // A clock of its own, that nobody sets.
            let clock = Clock::settable(START);
            apps.push(open(&url, Some(store.clone()), &folder, clock).await);
            folders.push(folder);
        }
        Some(Self {
            world,
            apps,
            _folders: folders,
        })
    }

    /// The coordinator whose turn it is.
    fn app(&self, turn: usize) -> &App {
        &self.apps[turn % REPLICAS]
    }

    async fn volunteers(&mut self, count: usize) -> Vec<Caller> {
        let mut volunteers = Vec::new();
        for _ in 0..count {
            volunteers.push(self.world.volunteer().await);
        }
        volunteers
    }
}

/// What `/readyz` answers.
async fn readiness(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = b"GET /readyz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

macro_rules! replicas {
    () => {
        match Replicas::start().await {
            Some(replicas) => replicas,
            None => return,
        }
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn those_who_live_are_known_until_they_take_leave() {
    let replicas = replicas!();
    let app = replicas.app(0);
    share::beat(app).await.unwrap();
    let living = async |now| {
        let mut tx = app.db.read().await.unwrap();
        coordinator_living(&mut tx, now).await.unwrap()
    };
    let now = app.clock.now_ms();
    assert_eq!(living(now).await, [app.id.as_str()]);
    let later = now.plus(COORDINATOR_ALIVE + Duration::from_secs(1));
    assert!(living(later).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn those_that_start_at_once_have_one_key() {
    let Some(url) = support::postgres().await else {
        return;
    };
    let folders: Vec<TempDir> = (0..REPLICAS)
        .map(|_| tempfile::tempdir().unwrap())
        .collect();
    let store = folders[0].path().join("store").to_str().unwrap().to_owned();
    let opening = folders
        .iter()
        .map(|folder| open(&url, Some(store.clone()), folder, Clock::settable(START)));
    let apps = join_all(opening).await;
    let keys: BTreeSet<[u8; 32]> = apps.iter().map(|app| app.key.to_bytes()).collect();
    let ids: BTreeSet<&str> = apps.iter().map(|app| app.id.as_str()).collect();
    assert_eq!((keys.len(), ids.len()), (1, REPLICAS));
    let identities = folders
        .iter()
        .map(|folder| server::tls_identity(folder.path(), Some(&url)));
    let pins: BTreeSet<String> = join_all(identities)
        .await
        .into_iter()
        .map(|identity| identity.unwrap().pin.to_string())
        .collect();
    assert_eq!(pins.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_crowd_at_all_of_them_gets_every_shard_once() {
    let mut replicas = replicas!();
    let crowd = replicas.volunteers(24).await;
    replicas.world.round(16).await;
    let claims = crowd.iter().enumerate().map(|(turn, caller)| {
        let app = replicas.app(turn).clone();
        async move { claim_work(&app, caller, Duration::ZERO).await.unwrap() }
    });
    let mut shards = BTreeSet::new();
    for work in join_all(claims).await.into_iter().flatten() {
        let Work::Train(shard) = work.lease.work else {
            panic!("not training work");
        };
        assert!(shards.insert(shard), "shard {shard} was handed out twice");
    }
    // Nobody was told "none" while there was some.
    assert_eq!(shards.len(), 16);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_worker_asking_all_of_them_has_one_lease() {
    let mut replicas = replicas!();
    let caller = replicas.world.volunteer().await;
    replicas.world.round(8).await;
    let claims = (0..9).map(|turn| claim_work(replicas.app(turn), &caller, Duration::ZERO));
    let leases: BTreeSet<String> = join_all(claims)
        .await
        .into_iter()
        .map(|work| work.unwrap().expect("there is work").lease.id.to_string())
        .collect();
    assert_eq!(leases.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_submission_at_all_of_them_has_one_answer() {
    let mut replicas = replicas!();
    for seed in 1..=4 {
        let caller = replicas.world.volunteer().await;
        if seed == 1 {
            replicas.world.round(4).await;
        }
        let work = replicas.world.claim(&caller).await.unwrap();
        let adapter = replicas.world.adapter(seed, [0.5, 0.5]);
        replicas.world.upload(&caller, &work, &adapter).await;
        let new = new_adapter(&work, &adapter);
        let sent =
            (0..6).map(|turn| submit_adapter(replicas.app(turn), &caller, new.clone(), |_| Ok(())));
        let answers: Vec<Acknowledged> = join_all(sent)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]));
        // Another request under the same lease comes too late, wherever it is sent.
        let other = cairn_coordinator::ops::submit_adapter::NewAdapter {
            request: RequestId::new(),
            adapter: support::name(b"another"),
            ..new
        };
        let late = submit_adapter(replicas.app(1), &caller, other, |_| Ok(())).await;
        assert_eq!(late.unwrap_err().reason(), ErrorReason::LeaseLost);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_arrives_at_clocks_apart_arrives_one_after_another() {
    let mut replicas = replicas!();
    // The first one's clock is ahead of the others'.
    replicas.world.clock.advance(Duration::from_secs(3));
    let crowd = replicas.volunteers(12).await;
    let round = replicas.world.round(12).await;
    let mut ready = Vec::new();
    for (seed, caller) in (1..).zip(&crowd) {
        let work = replicas.world.claim(caller).await.unwrap();
        let adapter = replicas.world.adapter(seed, [0.5, 0.5]);
        replicas.world.upload(caller, &work, &adapter).await;
        ready.push((caller, new_adapter(&work, &adapter)));
    }
    let sent = ready.into_iter().enumerate().map(|(turn, (caller, new))| {
        let app = replicas.app(turn).clone();
        async move { submit_adapter(&app, caller, new, |_| Ok(())).await.unwrap() }
    });
    let mut statements: Vec<ReceiptStatement> = join_all(sent)
        .await
        .iter()
        .map(|answer| serde_json::from_slice(&answer.statement).unwrap())
        .collect();
    statements.sort_by_key(|statement| statement.log_index);
    let times: Vec<i64> = statements.iter().map(|one| one.received_ms).collect();
    assert!(times.windows(2).all(|two| two[0] < two[1]), "{times:?}");
    assert_eq!(replicas.world.view(round.id).await.submissions.len(), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_model_has_one_round_whoever_opens_it() {
    let replicas = replicas!();
    let (text, request) = (round_text(4), RequestId::new());
    let maintainer = &replicas.world.maintainer;
    let same = (0..6).map(|turn| create_round(replicas.app(turn), maintainer, &text, request));
    let ids: BTreeSet<String> = join_all(same)
        .await
        .into_iter()
        .map(|round| round.unwrap().id.to_string())
        .collect();
    assert_eq!(ids.len(), 1);
    let others =
        (0..6).map(|turn| create_round(replicas.app(turn), maintainer, &text, RequestId::new()));
    for refused in join_all(others).await {
        assert_eq!(
            refused.unwrap_err().reason(),
            ErrorReason::PreconditionFailed
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_join_token_is_spent_once_and_its_key_enrolled_once() {
    let replicas = replicas!();
    let token = replicas.world.fixture.token(Role::Volunteer, 1).await;
    let new = |seed: u8| NewEnrolment {
        join_token: token.clone(),
        public_key: support::key(seed).verifying_key(),
        display_name: "bob".to_owned(),
    };
    // The answer was lost, and the key asks again elsewhere.
    let same = (0..6).map(|turn| enroll(replicas.app(turn), new(99)));
    let workers: BTreeSet<String> = join_all(same)
        .await
        .into_iter()
        .map(|caller| caller.unwrap().worker.to_string())
        .collect();
    assert_eq!(workers.len(), 1);
    let others = (0..4u8).map(|turn| enroll(replicas.app(turn.into()), new(100 + turn)));
    for refused in join_all(others).await {
        assert_eq!(refused.unwrap_err().reason(), ErrorReason::TokenSpent);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tasks_run_by_all_of_them_at_once_do_nothing_twice() {
    let mut replicas = replicas!();
    let round = replicas.world.round_with(6, "segments = 0").await;
    for seed in 1..=6 {
        replicas.world.contribute(seed, [0.4, 0.4]).await;
    }
    // Not as `start` does: nobody asks whose turn it is.
    for _ in 0..200 {
        for done in join_all(replicas.apps.iter().map(tasks::settle)).await {
            // Whoever was slower may be told so, and looks again.
            if let Err(problem) = done {
                assert!(problem.reason().retry(), "{}", problem.full());
            }
        }
        if !replicas.world.evaluate_one().await {
            break;
        }
    }
    tasks::settle(replicas.world.app()).await.unwrap();
    assert_eq!(replicas.world.outcome(round.id).await.0, "published");
    let app = replicas.app(1);
    let head = get_tree_head(app).await.unwrap();
    let key = app.key.verifying_key();
    let head = TreeHeadStatement::verify(&head, key.as_bytes()).unwrap();
    let entries = list_entries(app, 0, 1_000).await.unwrap();
    let leaves: Vec<_> = entries
        .iter()
        .map(|entry| leaf_hash(entry.body.as_bytes()))
        .collect();
    assert_eq!(hex::encode(root(&leaves)), head.root);
    // Two manifests; an acknowledgement and a verdict each.
    let manifests = entries.iter().filter(|entry| entry.kind == "manifest");
    assert_eq!((manifests.count(), entries.len()), (2, 2 + 2 * 6));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_task_is_run_by_one_until_that_one_is_gone() {
    let replicas = replicas!();
    let owners = async |task: &str| {
        let asked = replicas.apps.iter().map(|app| share::is_ours(app, task));
        let own: Vec<bool> = join_all(asked)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        own
    };
    for app in &replicas.apps {
        share::beat(app).await.unwrap();
    }
    let first = owners("judge").await;
    assert_eq!(first.iter().filter(|own| **own).count(), 1, "{first:?}");
    assert_eq!(owners("judge").await, first);
    let owner = first.iter().position(|own| *own).unwrap();
    // It gives no more signs of life; the others do.
    for (number, app) in replicas.apps.iter().enumerate() {
        app.clock.advance(COORDINATOR_ALIVE);
        if number != owner {
            share::beat(app).await.unwrap();
        }
    }
    let others = replicas.apps.iter().enumerate();
    let others = others.filter(|(number, _)| *number != owner);
    let asked = others.map(|(_, app)| share::is_ours(app, "judge"));
    let own: Vec<bool> = join_all(asked)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(own.iter().filter(|own| **own).count(), 1, "{own:?}");
    // Back again, it finds that another has it.
    share::beat(&replicas.apps[owner]).await.unwrap();
    assert!(
        !share::is_ours(&replicas.apps[owner], "judge")
            .await
            .unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_waits_at_one_is_woken_by_another() {
    let mut replicas = replicas!();
    let caller = replicas.world.volunteer().await;
    for app in &replicas.apps {
        let (tells, hears) = (app.clone(), app.clone());
        tokio::spawn(async move { share::tell(&tells).await });
        tokio::spawn(async move { share::hear(&hears).await });
    }
    for app in &replicas.apps {
        while !app.wake.hears_others() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let app = replicas.apps[2].clone();
    // No period helps a claimer: it would wait to the end.
    let waiting =
        tokio::spawn(async move { claim_work(&app, &caller, Duration::from_secs(25)).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let opened = std::time::Duration::from_secs(10);
    replicas.world.round(1).await;
    let work = tokio::time::timeout(opened, waiting).await;
    let work = work.expect("it is woken").unwrap().unwrap();
    assert!(work.is_some());
    for app in &replicas.apps {
        app.lifecycle.soft().cancel();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_lost_line_for_wake_ups_is_noticed_and_opened_again() {
    let replicas = replicas!();
    let app = replicas.apps[1].clone();
    let hears = app.clone();
    tokio::spawn(async move { share::hear(&hears).await });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serves = app.clone();
    tokio::spawn(async move { http::serve(serves, listener).await });
    // What a balancer asks, until it hears what it waits for.
    let until = async |wanted: &str| {
        let wait = async {
            while !readiness(address).await.starts_with(wanted) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), wait).await
    };
    let url = replicas.world.fixture.database_url.clone().unwrap();
    let mut connection = <sqlx::AnyConnection as sqlx::Connection>::connect(&url)
        .await
        .unwrap();
    let cut = "select pg_terminate_backend(pid) as cut from pg_stat_activity \
               where datname = current_database() and query like 'LISTEN%'";
    let mut noticed = false;
    for _ in 0..5 {
        until("HTTP/1.1 200").await.unwrap();
        // Cuts nothing when it has only begun to listen.
        sqlx::query(cut).execute(&mut connection).await.unwrap();
        if until("HTTP/1.1 503").await.is_ok() {
            noticed = true;
            break;
        }
    }
    assert!(noticed);
    until("HTTP/1.1 200").await.unwrap();
    assert!(app.wake.hears_others());
    app.lifecycle.soft().cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_upload_goes_on_at_another_and_two_that_finish_it_do_no_harm() {
    let replicas = replicas!();
    let maintainer = &replicas.world.maintainer;
    let bytes = vec![7; 300_000];
    let name = support::name(&bytes);
    let send = async |turn: usize, offset: u64, until: usize| {
        let header = UploadHeader {
            name,
            offset,
            lease: None,
        };
        let part = bytes[usize::try_from(offset).unwrap()..until].chunks(100_000);
        let chunks: Vec<_> = part.map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        let chunks = futures::stream::iter(chunks);
        write_blob(replicas.app(turn), maintainer, header, chunks).await
    };
    let held = async |turn: usize| {
        let status = query_write_status(replicas.app(turn), maintainer, name);
        status.await.unwrap()
    };
    // The first one dies with a third of it; the others know nothing of that.
    assert!(!send(0, 0, 100_000).await.unwrap().complete);
    assert_eq!(held(0).await.committed_bytes, 100_000);
    assert_eq!(held(1).await.committed_bytes, 0);
    let refused = send(1, 100_000, 300_000).await.unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::WrongOffset);
    // All of them finish it, at the same moment.
    let (first, second, third) = tokio::join!(
        send(0, 100_000, 300_000),
        send(1, 0, 300_000),
        send(2, 0, 300_000)
    );
    for done in [first, second, third] {
        assert!(done.unwrap().complete);
    }
    for (turn, app) in replicas.apps.iter().enumerate() {
        assert!(held(turn).await.complete);
        let got = app.blobs.get_bytes(name.digest, 1_000_000).await.unwrap();
        assert_eq!(got, bytes);
    }
    // One that was finished elsewhere lies in its folder until it is old.
    let app = replicas.app(1);
    let left = app.uploads_folder.join("left");
    std::fs::write(&left, b"half of it").unwrap();
    sweep_uploads(app).await.unwrap();
    assert!(left.exists());
    app.clock.advance(Duration::from_hours(24 * 365 * 20));
    sweep_uploads(app).await.unwrap();
    assert!(!left.exists());
}
