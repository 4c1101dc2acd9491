-- times are unix milliseconds, ids are uuid text, digests are 64 hex digits (blake3), losses are nats per scored token

create table settings (
    name text primary key,
    value text not null
);

create table workers (
    id text primary key,
    public_key bytea not null unique,        -- ed25519, 32 bytes
    display_name text not null,
    role text not null check (role in ('volunteer', 'evaluator', 'maintainer')),
    created_ms bigint not null,
    revoked_ms bigint
);

create table join_tokens (
    token_hash text primary key,            -- blake3 of the token; the token itself is shown once and never stored
    role text not null check (role in ('volunteer', 'evaluator', 'maintainer')),
    uses_left bigint not null check (uses_left >= 0),
    created_ms bigint not null,
    expires_ms bigint not null
);

-- makes enrolment idempotent: the same key may present its token again
create table enrolments (
    token_hash text not null references join_tokens (token_hash),
    worker_id text not null references workers (id),
    primary key (token_hash, worker_id)
);

create table challenges (
    challenge_hash text primary key,
    public_key bytea not null,
    expires_ms bigint not null
);

create table sessions (
    token_hash text primary key,
    worker_id text not null references workers (id),
    expires_ms bigint not null
);

create table blobs (
    digest text primary key,
    size_bytes bigint not null check (size_bytes >= 0),
    audience text not null check (audience in ('members', 'evaluators')),  -- who may read it: everybody enrolled, or evaluators and maintainers (and its uploader)
    uploader text not null,                 -- worker id, or 'server'
    created_ms bigint not null
);

create table models (
    name text primary key,
    head_revision bigint not null,          -- moved by compare-and-swap only
    created_ms bigint not null,
    request_id text not null unique
);

create table checkpoints (
    model text not null references models (name),
    revision bigint not null,               -- 0 is the base
    commit_id text not null,                -- 40 hex digits
    parent_commit text,
    round_id text,
    contributions bigint not null,
    manifest text not null,                 -- digest of the signed manifest's blob
    gate_loss double precision,
    audit_loss double precision,
    created_ms bigint not null,
    primary key (model, revision),
    unique (model, commit_id)
);

create table checkpoint_files (
    model text not null,
    revision bigint not null,
    folder text not null check (folder in ('checkpoint', 'stack')),
    path text not null,
    digest text not null references blobs (digest),
    size_bytes bigint not null,
    sha256 text not null,
    primary key (model, revision, folder, path),
    foreign key (model, revision) references checkpoints (model, revision)
);

create table datasets (
    name text primary key,
    set_kind text not null check (set_kind in ('train', 'gate', 'audit', 'dev')),
    license text not null,
    source text not null,
    records bigint not null,
    bytes bigint not null,
    created_ms bigint not null,
    request_id text not null unique
);

create table dataset_chunks (
    dataset text not null references datasets (name),
    position bigint not null,
    digest text not null references blobs (digest),
    size_bytes bigint not null,
    records bigint not null,
    primary key (dataset, position)
);

create table rounds (
    id text primary key,
    model text not null references models (name),
    base_revision bigint not null,
    base_commit text not null,
    dataset text not null references datasets (name),
    round_file text not null,               -- TOML, as validated
    adapter_bytes_max bigint not null,      -- what the recipe's adapter can take at most; larger uploads are refused
    state text not null check (state in ('draft', 'training', 'judging', 'folding', 'published', 'failed', 'aborted')),
    reason text not null default '',
    choice text,                            -- JSON: the chosen stack (submissions and weights), from `folding` on
    published_revision bigint,
    gate_loss_before double precision,
    gate_loss_after double precision,
    audit_loss_before double precision,
    audit_loss_after double precision,
    created_ms bigint not null,
    deadline_ms bigint not null,
    ended_ms bigint,
    request_id text not null unique
);

create table shards (
    round_id text not null references rounds (id),
    position bigint not null,
    records text not null,                  -- JSON: ranges of chunks
    record_count bigint not null,
    bytes bigint not null,                  -- of the records: the weight p_i of an adapter comes from this, never from the worker
    state text not null check (state in ('open', 'leased', 'submitted', 'done', 'stopped')),
    generation bigint not null default 0,   -- of the newest lease; fences older ones
    primary key (round_id, position)
);

create table shard_failures (
    round_id text not null,
    shard bigint not null,
    worker_id text not null references workers (id),
    detail text not null,
    at_ms bigint not null,
    primary key (round_id, shard, worker_id), -- different workers count, not tries
    foreign key (round_id, shard) references shards (round_id, position)
);

create table evaluations (
    id text primary key,
    round_id text not null references rounds (id),
    candidate_key text not null,            -- blake3 of the canonical candidate: adapters with weights, and sets
    candidate text not null,                -- JSON: [{submission, weight}], empty for the base alone
    sets text not null check (sets in ('gate', 'gate+audit')),
    purpose text not null,                  -- in words, for people
    state text not null check (state in ('open', 'leased', 'done', 'failed', 'cancelled')),
    generation bigint not null default 0,
    failures bigint not null default 0,
    gate_loss double precision,
    audit_loss double precision,
    gate_scores text,                       -- digest of the scores' blob: nll and tokens of each record
    audit_scores text,
    evaluator_id text,
    created_ms bigint not null,
    done_ms bigint,
    unique (round_id, candidate_key)
);

create table leases (
    id text primary key,
    kind text not null check (kind in ('train', 'evaluate')),
    round_id text not null references rounds (id),
    shard bigint,                           -- of a train lease
    evaluation_id text references evaluations (id),
    worker_id text not null references workers (id),
    generation bigint not null,
    nonce bytea not null,
    state text not null check (state in ('active', 'done', 'released', 'failed', 'expired')),
    step bigint not null default 0,
    steps bigint not null default 0,
    created_ms bigint not null,
    expires_ms bigint not null
);

create index leases_active on leases (state, expires_ms);

create table submissions (
    id text primary key,
    lease_id text not null unique references leases (id), -- a lease is credited at most once
    request_id text not null unique,
    round_id text not null references rounds (id),
    shard bigint not null,
    worker_id text not null references workers (id),
    adapter text not null references blobs (digest),
    adapter_bytes bigint not null,
    adapter_config text not null,
    numbers text not null,                  -- JSON as the worker said it; never trusted
    signature bytea not null,
    receipt_statement text not null,
    receipt_signature bytea not null,
    state text not null check (state in ('received', 'evaluating', 'accepted', 'rejected')),
    reason text not null default '',
    detail text not null default '',
    norm double precision,                  -- product-space Frobenius norm of the delta
    evidence text not null default '{}',    -- JSON: the numbers behind the verdict
    gate_loss double precision,
    audit_loss double precision,
    gain double precision,
    gain_se double precision,
    weight double precision not null default 0, -- effective factor in the published checkpoint
    credit_tokens bigint not null default 0,
    created_ms bigint not null,
    decided_ms bigint
);

create index submissions_round on submissions (round_id, state);
create index submissions_worker on submissions (worker_id, created_ms);

-- uploads in progress: the bytes lie beside the store until their digest is right
create table uploads (
    digest text not null,
    uploader text not null references workers (id),
    size_bytes bigint not null,
    created_ms bigint not null,
    primary key (digest, uploader)
);
