//! Every limit of the coordinator, with its unit and its reason. Those of the wire are in
//! `cairn_proto::limits`.
use std::time::Duration;

/// What may be set per server; the defaults below are what runs.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Below this much free space, bytes, no upload begins and no lease is given.
    pub disk_free_bytes_min: u64,
    /// Largest blob a maintainer may upload, bytes.
    pub upload_bytes_max: u64,
    /// Connections open at once.
    pub connections_max: usize,
    /// Longest wait for the next chunk of an upload, or for a reader to take one.
    pub stream_idle: Duration,
    /// Longest silence of a connection; live clients answer pings far sooner.
    pub connection_idle: Duration,
    /// How long a URL into the blob store is valid; none: all bytes go through us.
    pub direct_url: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            disk_free_bytes_min: DISK_FREE_BYTES_MIN,
            upload_bytes_max: cairn_proto::limits::BLOB_BYTES_MAX,
            connections_max: CONNECTIONS_MAX,
            stream_idle: STREAM_IDLE,
            connection_idle: CONNECTION_IDLE,
            direct_url: Some(DIRECT_URL),
        }
    }
}

/// Free space kept, bytes: room for the database to go on and for people to clean up.
pub const DISK_FREE_BYTES_MIN: u64 = 256 * 1024 * 1024;

/// What a caller is told to wait before it tries again.
pub const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Connections open at once: each volunteer holds one for as long as it waits for work, and a herd
/// that comes back after a restart comes whole. Fewer where the system allows fewer open files.
pub const CONNECTIONS_MAX: usize = 16_384;

/// Open files that everything but connections needs: database, blobs, uploads, HTTP.
pub const FILES_SPARE: u64 = 1_024;

/// Connections open at once from one address: a class room behind one router.
pub const CONNECTIONS_PER_ADDRESS_MAX: usize = 256;

/// TLS handshakes and new connections waiting to be served: beyond it `accept` waits.
pub const HANDSHAKES_MAX: usize = 128;

/// Longest TLS handshake: two round trips on the worst line.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for a connection's first bytes (the HTTP/2 preface): slow ones are attacks.
pub const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest silence of a connection.
pub const CONNECTION_IDLE: Duration = Duration::from_secs(90);

/// How often a silent connection is pinged, and how long the answer may take.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// See [`KEEPALIVE_INTERVAL`].
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Calls running at once on one connection: a worker needs a handful.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 64;

/// Flow-control window of one stream, bytes: one chunk in flight is enough on a LAN, and it bounds
/// what an upload can make us hold.
pub const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;

/// Flow-control window of one connection, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// Largest header list of a call, bytes: a token and the usual gRPC headers take under 1 KiB.
pub const HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;

/// Streams a client may reset before we have seen them: rapid-reset floods end the connection.
pub const PENDING_RESETS_MAX: usize = 32;

/// Longest unary call; a long poll (30 s) and a large list fit.
pub const CALL_TIMEOUT: Duration = Duration::from_mins(1);

/// Longest wait for the next chunk of a stream.
pub const STREAM_IDLE: Duration = Duration::from_mins(1);

/// Calls running at once over all connections: as many as connections, as whoever waits for work
/// has a call running.
pub const CALLS_MAX: usize = CONNECTIONS_MAX;

/// Uploads running at once: each holds a chunk and its decoding, about 3 MiB.
pub const UPLOADS_RUNNING_MAX: usize = 32;

/// Uploads of one identity that run at once: an adapter, what is audited of another, and lines that
/// were cut and have not been noticed yet.
pub const UPLOADS_RUNNING_PER_WORKER_MAX: usize = 4;

/// Longest wait for one of [`UPLOADS_RUNNING_MAX`] places.
pub const UPLOAD_WAIT: Duration = Duration::from_secs(20);

/// Unfinished uploads of one identity: a maintainer sends many files one after another, each ends
/// or is resumed.
pub const UPLOADS_PER_WORKER_MAX: i64 = 64;

/// An unfinished upload nobody has touched for so long is removed.
pub const UPLOAD_STALE: Duration = Duration::from_hours(24);

/// An unreferenced blob younger than this is kept: its row's transaction may still be on its way.
pub const BLOB_UNREFERENCED: Duration = Duration::from_hours(24);

/// Bytes read or hashed at once: large enough for BLAKE3's SIMD, small enough to be free.
pub const READ_BYTES: usize = 256 * 1024;

/// Largest blob read into memory at once, bytes (configs, manifests, scores).
pub const BLOB_IN_MEMORY_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Chunks waiting between the disk and a reader.
pub const READ_AHEAD_CHUNKS: usize = 2;

/// How long after a start an audit may still be answered whose time ran out while we were away.
pub const AUDIT_AFTER_START: Duration = Duration::from_mins(5);

/// How long an adapter may be uploaded after a receipt for it was shown.
pub const RESTORE_UPLOAD: Duration = Duration::from_hours(24);

/// How long a challenge may be answered.
pub const CHALLENGE_TTL: Duration = Duration::from_mins(1);

/// Live challenges of one key: a machine signs on once at a time.
pub const CHALLENGES_PER_KEY_MAX: i64 = 16;

/// How long a session lasts.
pub const SESSION_TTL: Duration = Duration::from_hours(1);

/// Live sessions of one identity; the oldest ends when another begins.
pub const SESSIONS_PER_WORKER_MAX: i64 = 32;

/// How long a looked-up session is believed without asking the database: a disabled identity stops
/// within it.
pub const SESSION_CACHE: Duration = Duration::from_secs(5);

/// Sessions remembered at once.
pub const SESSION_CACHE_MAX: usize = 10_000;

/// Default life of a join token.
pub const JOIN_TOKEN_TTL: Duration = Duration::from_hours(1);

/// Calls without a session from one address: a burst of this many, refilled at the rate below.
pub const OPEN_CALLS_BURST: f64 = 200.0;
/// Calls a second; see [`OPEN_CALLS_BURST`].
pub const OPEN_CALLS_PER_SECOND: f64 = 50.0;

/// Addresses whose rate is remembered at once.
pub const OPEN_CALLS_ADDRESSES_MAX: usize = 10_000;

/// Connections to the database: SQLite reads in parallel, writes one at a time.
pub const DATABASE_READERS_MAX: u32 = 8;

/// Longest wait for a database connection.
pub const DATABASE_WAIT: Duration = Duration::from_secs(20);

/// Longest wait for another process's write on SQLite, milliseconds.
pub const SQLITE_BUSY_MS: u32 = 15_000;

/// Longest pause in the middle of a transaction on PostgreSQL, milliseconds: ours wait for
/// nothing but the database, but for garbage on its way out of the store, which may stay; whoever is
/// that slow has stopped or lost its line.
pub const POSTGRES_IDLE_MS: u32 = 15_000;

/// Longest wait for a row that another transaction holds, milliseconds: longer than
/// [`POSTGRES_IDLE_MS`], so that one dead coordinator makes nobody fail.
pub const POSTGRES_LOCK_MS: u32 = 20_000;

/// How long a coordinator counts as alive after its last sign of life; then others take its tasks
/// over. Far more than one slow commit, and no more than a waiting round should notice.
pub const COORDINATOR_ALIVE: Duration = Duration::from_secs(10);

/// How often a coordinator gives a sign of life: three may be lost.
pub const COORDINATOR_BEAT: Duration = Duration::from_millis(2_500);

/// Shortest time between two wake-ups that one coordinator sends to the others: PostgreSQL makes
/// every transaction that notifies wait for the one before it.
pub const WAKE_INTERVAL: Duration = Duration::from_millis(20);

/// How often a silent line to PostgreSQL, on which others' wake-ups come, is tried; and how long the
/// answer may take.
pub const LISTEN_PROBE: Duration = Duration::from_secs(10);
/// See [`LISTEN_PROBE`].
pub const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long `/readyz` waits for the database and the store.
pub const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// How long running calls may take after SIGTERM.
pub const DRAIN_GRACE: Duration = Duration::from_secs(30);

/// Longest wait for an HTTP request's headers.
pub const HTTP_HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// HTTP requests at once.
pub const HTTP_CONNECTIONS_MAX: usize = 512;

/// Largest config.json of a model, bytes.
pub const CONFIG_JSON_BYTES_MAX: u64 = 1024 * 1024;

/// Largest signed manifest sent in one answer, bytes; larger ones are read as the files they are.
pub const MANIFEST_INLINE_BYTES_MAX: u64 = 1024 * 1024;

/// Most contributions whose files are named in one answer: two files of some 300 bytes each stay
/// below the message limit.
pub const CONTRIBUTIONS_INLINE_MAX: u32 = 4_000;

/// Judging waits at least this long for an evaluator after the deadline, and after each answer; where
/// the round's own deadline is longer than this, as long as that. Then the round fails.
pub const JUDGING_WAIT_MIN: Duration = Duration::from_mins(10);

/// How long a URL into the blob store is valid: one call's parts on a slow home line, no longer,
/// since who has it needs no session.
pub const DIRECT_URL: Duration = Duration::from_mins(10);

/// Bytes of one part of a large object: each put holds three of them, and 64 GiB are 8,192 parts,
/// below the 10,000 that S3 takes.
pub const PUT_PART_BYTES: usize = 8 * 1024 * 1024;

/// Parts of one object on their way at once: one is filled while two travel.
pub const PUT_PARTS_RUNNING_MAX: usize = 2;

/// Longest connecting to a remote store.
pub const STORE_CONNECT: Duration = Duration::from_secs(5);

/// Longest silence of a remote store in the middle of a request: a part's upload fits.
pub const STORE_SILENCE: Duration = Duration::from_secs(20);

/// How often a request to a remote store is repeated, within [`STORE_RETRY`]: whoever waits for us
/// gives up after [`CALL_TIMEOUT`].
pub const STORE_RETRIES: usize = 3;
/// See [`STORE_RETRIES`].
pub const STORE_RETRY: Duration = Duration::from_secs(30);

/// Longest trying out of the blob store at start.
pub const STORE_PROBE: Duration = Duration::from_secs(45);

/// How often a client hears of a finished upload that is being checked.
pub const CHECK_REPORT: Duration = Duration::from_secs(5);
