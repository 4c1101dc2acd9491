-- several coordinators over one database: who lives, and which of them runs a background task

create table coordinators (
    id text primary key,                    -- of its data folder
    alive_until_ms bigint not null          -- moved on while it lives; then others take its tasks over
);

create table task_owners (
    task text primary key,
    coordinator_id text not null            -- runs it while it lives; need not have a row above
);

-- who arrived last in a round
create index submissions_arrival on submissions (round_id, created_ms);
