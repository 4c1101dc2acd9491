-- verification: audits, strikes, revocations, the log; evaluations become any work for evaluators

alter table evaluations add column kind text not null default 'score' check (kind in ('score', 'guide', 'replay', 'learn'));
alter table evaluations add column scope text not null default '';         -- what is scored beside gate and audit: '', 'base', 'final', 'shard:OWN:OTHER'
alter table evaluations add column subject text;                           -- submission that is replayed
alter table evaluations add column shard bigint;                           -- shard that is guided
alter table evaluations add column steps bigint not null default 0;        -- passes of a learning
alter table evaluations add column extra_scores text not null default '{}'; -- JSON by set name (guard/N, probe/N, shard/N, history/N): loss, digest of the scores' blob
alter table evaluations add column findings text;                          -- JSON: what a guide, replay or learning came to

alter table submissions add column commitment_root text;                   -- hex, 32 bytes: Merkle root over the training states
alter table submissions add column commitment_leaves bigint not null default 0;
alter table submissions add column commitment_factors text;                -- digest of the last training state's factors
alter table submissions add column audit text;                             -- JSON: segment drawn, until when, what was opened, how it ended; null when not audited
alter table submissions add column verdict_statement text;                 -- receipt with the verdict
alter table submissions add column verdict_signature blob;
alter table submissions add column revoked_ms bigint;

-- product-space inner products of a round's measured submissions; the norm is the root of a row's own
create table inner_products (
    round_id text not null references rounds (id),
    one text not null references submissions (id),
    other text not null references submissions (id),   -- one >= other, as text
    value double precision not null,
    primary key (round_id, one, other)
);

create table strikes (
    submission_id text primary key references submissions (id), -- one strike a rejection
    worker_id text not null references workers (id),
    reason text not null,
    at_ms bigint not null,
    voided_ms bigint,
    void_reason text
);

create index strikes_worker on strikes (worker_id, at_ms);

create table revocations (
    submission_id text primary key references submissions (id),
    reason text not null,
    revoked_by text not null references workers (id),
    revoked_ms bigint not null,
    request_id text not null unique
);

-- every checkpoint that contains a revoked contribution, and what took its place
create table refolds (
    submission_id text not null references revocations (submission_id),
    model text not null,
    revision bigint not null,
    replacement bigint,                     -- revision without the contribution; null until folded
    failure text not null default '',
    primary key (submission_id, model, revision),
    foreign key (model, revision) references checkpoints (model, revision)
);

-- which contributions a checkpoint is made of: what its manifest says, to be looked up by contribution
create table checkpoint_contributions (
    submission_id text not null,
    model text not null,
    revision bigint not null,
    primary key (submission_id, model, revision),
    foreign key (model, revision) references checkpoints (model, revision)
);

create index checkpoint_contributions_of on checkpoint_contributions (model, revision);

-- the round's stack at the recipe's rank; a check can only be changed with its table
create table checkpoint_files_wider (
    model text not null,
    revision bigint not null,
    folder text not null check (folder in ('checkpoint', 'stack', 'compressed')),
    path text not null,
    digest text not null references blobs (digest),
    size_bytes bigint not null,
    sha256 text not null,
    primary key (model, revision, folder, path),
    foreign key (model, revision) references checkpoints (model, revision)
);
insert into checkpoint_files_wider select model, revision, folder, path, digest, size_bytes, sha256 from checkpoint_files;
drop table checkpoint_files;
alter table checkpoint_files_wider rename to checkpoint_files;

alter table checkpoints add column refold_of bigint;    -- the round's revision of which this is a fold without revoked contributions
alter table checkpoints add column spectrum text;       -- JSON: norm and effective rank of the stack, per module and in all
alter table rounds add column carry text;               -- JSON: the factors that training starts from, when not fresh ones

-- blobs that a json column names: extra scores, guides, opened training states, carried factors
create table kept_blobs (
    digest text not null references blobs (digest),
    round_id text not null references rounds (id),
    forever bigint not null check (forever in (0, 1)), -- 1: as long as the round's row; 0: until the round has ended
    primary key (digest, round_id)
);

-- acknowledged by a coordinator that was lost, and handed in again after their rounds: credit, not judged any more
create table restored_submissions (
    id text primary key,
    lease_id text not null unique,          -- a lease is credited at most once
    worker_id text not null references workers (id),
    round_id text not null,                 -- may be unknown here
    shard bigint not null,
    adapter text not null references blobs (digest),
    receipt_statement text not null,        -- signed anew with its place in this log; says what the old one said
    receipt_signature blob not null,
    verdict text not null check (verdict in ('accepted', 'rejected')),
    reason text not null,
    credit_tokens bigint not null,
    created_ms bigint not null,             -- when it was acknowledged the first time
    restored_ms bigint not null
);

create index restored_submissions_worker on restored_submissions (worker_id, created_ms);

-- adapters that may be uploaded again because a receipt names them
create table restore_grants (
    lease_id text primary key,
    worker_id text not null references workers (id),
    adapter text not null,
    adapter_bytes bigint not null,
    until_ms bigint not null
);

-- leaves of the log in order; nodes are the roots of its complete subtrees
create table log_entries (
    position bigint primary key,
    kind text not null check (kind in ('receipt', 'manifest')),
    body text not null,
    created_ms bigint not null
);

create table log_nodes (
    level bigint not null,                  -- 0: leaves
    position bigint not null,
    hash blob not null,                     -- sha-256
    primary key (level, position)
);

-- decided submissions whose verdict has no receipt yet
create index submissions_unsealed on submissions (decided_ms) where verdict_statement is null;
