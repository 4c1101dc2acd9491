-- The adapters of which checkpoints are made, as files for whoever folds again. Written when a
-- contribution is stacked; the weights are the submission's own blob.
create table contribution_files (
    submission_id text not null references submissions (id),
    path text not null,                     -- inside the contribution's folder
    digest text not null references blobs (digest),
    size_bytes bigint not null,
    sha256 text not null,
    primary key (submission_id, path)
);

create index contribution_files_digest on contribution_files (digest);
