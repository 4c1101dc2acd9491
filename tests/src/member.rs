//! One signed-on client, with the calls of its role.
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use cairn_proto::client::{Client, ClientError};
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::sign_submission;
use cairn_proto::v1;
use cairn_stack::digest::Digest;
use cairn_stack::files::{FileEntry, list_files};
use tempfile::TempDir;

use crate::adapters::Adapter;
use crate::tiny;
use crate::training::{STEPS, Training};

/// A signed-on client.
pub struct Member {
    /// Its connection.
    pub client: Client,
    /// Files on their way.
    scratch: TempDir,
}

/// The reason of a refused call.
///
/// # Panics
/// When the call was not refused, or without a reason.
#[track_caller]
pub fn refusal<T>(answer: Result<T, ClientError>) -> ErrorReason {
    match answer {
        Ok(_) => panic!("the call was not refused"),
        Err(error) => error
            .reason()
            .unwrap_or_else(|| panic!("refused without a reason: {error}")),
    }
}

/// A fresh request id.
#[must_use]
pub fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The training work of a lease.
///
/// # Panics
/// When it is a lease on something else.
#[must_use]
pub fn training(lease: &v1::Lease) -> &v1::TrainWork {
    match &lease.work {
        Some(v1::lease::Work::Train(work)) => work,
        other => panic!("expected training work, got {other:?}"),
    }
}

/// Whether the work asks for a commitment.
fn commits(lease: &v1::Lease) -> bool {
    training(lease).segments > 0
}

/// The states that members of these tests commit to.
#[must_use]
pub fn training_of(lease: &v1::Lease, adapter: &Adapter) -> Training {
    Training::of(adapter, training(lease).segments)
}

macro_rules! call {
    ($self:ident, $service:ident . $method:ident, $request:expr) => {{
        let request = $request;
        $self
            .client
            .call(|mut to| {
                let request = request.clone();
                async move { to.$service.$method(request).await }
            })
            .await
    }};
}

/// What any role may do.
impl Member {
    /// Wraps a client.
    ///
    /// # Errors
    /// When there is no room for temporary files.
    pub fn new(client: Client) -> Result<Self> {
        Ok(Self {
            client,
            scratch: tempfile::tempdir()?,
        })
    }

    /// The id the coordinator gave.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.client.identity().worker_id
    }

    /// A round's view.
    ///
    /// # Errors
    /// As the call.
    pub async fn round(&self, id: &str) -> Result<v1::RoundView, ClientError> {
        let answer = call!(
            self,
            rounds.get_round,
            v1::GetRoundRequest { id: id.to_owned() }
        )?;
        answer
            .view
            .ok_or_else(|| ClientError::Malformed("no view".to_owned()))
    }

    /// A checkpoint of the tiny model; `""` for its head.
    ///
    /// # Errors
    /// As the call.
    pub async fn checkpoint(
        &self,
        revision: &str,
    ) -> Result<v1::GetCheckpointResponse, ClientError> {
        let (model, revision) = (tiny::MODEL.to_owned(), revision.to_owned());
        call!(
            self,
            models.get_checkpoint,
            v1::GetCheckpointRequest { model, revision }
        )
    }

    /// A dataset with the chunks the caller may know of.
    ///
    /// # Errors
    /// As the call.
    pub async fn dataset(&self, name: &str) -> Result<v1::GetDatasetResponse, ClientError> {
        call!(
            self,
            datasets.get_dataset,
            v1::GetDatasetRequest {
                name: name.to_owned()
            }
        )
    }

    /// Downloads a blob.
    ///
    /// # Errors
    /// As the call.
    pub async fn fetch(&self, blob: &v1::BlobRef) -> Result<Vec<u8>, ClientError> {
        let path = self.scratch.path().join(&blob.digest);
        self.client
            .download(BlobName::try_from(blob)?, &path, &|_| {})
            .await?;
        Ok(std::fs::read(&path).expect("it was just downloaded"))
    }

    /// Downloads a folder's files to `to`.
    ///
    /// # Errors
    /// As the calls.
    pub async fn fetch_folder(&self, files: &[v1::File], to: &Path) -> Result<()> {
        for file in files {
            let bytes = self
                .fetch(file.blob.as_ref().context("a file without a blob")?)
                .await?;
            let path = to.join(&file.path);
            std::fs::create_dir_all(path.parent().context("a path without a folder")?)?;
            std::fs::write(path, bytes)?;
        }
        Ok(())
    }

    /// Uploads bytes; `lease_id` is empty for maintainers.
    ///
    /// # Errors
    /// As the call.
    pub async fn upload(&self, bytes: &[u8], lease_id: &str) -> Result<BlobName, ClientError> {
        let name = BlobName {
            digest: Digest::of(bytes),
            size_bytes: bytes.len() as u64,
        };
        let path = self.scratch.path().join(format!("{}.up", name.digest));
        std::fs::write(&path, bytes).expect("the temporary folder takes it");
        self.client.upload(&path, name, lease_id, &|_| {}).await?;
        Ok(name)
    }

    /// Uploads by hand: whatever header, whatever chunks.
    ///
    /// # Errors
    /// As the call.
    pub async fn upload_raw(
        &self,
        name: BlobName,
        offset: u64,
        lease_id: &str,
        chunks: &[&[u8]],
    ) -> Result<v1::WriteBlobResponse, ClientError> {
        use v1::write_blob_request::{Header, Part};
        let header = Header {
            blob: Some(name.into()),
            offset,
            lease_id: lease_id.to_owned(),
        };
        let parts = std::iter::once(Part::Header(header))
            .chain(chunks.iter().map(|chunk| Part::Chunk(chunk.to_vec())));
        let messages: Vec<v1::WriteBlobRequest> = parts
            .map(|part| v1::WriteBlobRequest { part: Some(part) })
            .collect();
        self.client
            .call_once(|mut to| {
                let messages = messages.clone();
                async move { to.blobs.write_blob(futures::stream::iter(messages)).await }
            })
            .await
    }

    /// How many bytes of an upload are held.
    ///
    /// # Errors
    /// As the call.
    pub async fn committed(&self, name: BlobName) -> Result<u64, ClientError> {
        let request = v1::QueryWriteStatusRequest {
            blob: Some(name.into()),
        };
        Ok(call!(self, blobs.query_write_status, request)?.committed_bytes)
    }
}

/// What volunteers do.
impl Member {
    /// Claims work if there is some now.
    ///
    /// # Errors
    /// As the call.
    pub async fn claim(&self) -> Result<Option<v1::Lease>, ClientError> {
        self.claim_within(0).await
    }

    /// Claims work, waiting for some.
    ///
    /// # Errors
    /// As the call.
    pub async fn claim_within(&self, wait_ms: i64) -> Result<Option<v1::Lease>, ClientError> {
        Ok(call!(self, work.claim_work, v1::ClaimWorkRequest { wait_ms })?.lease)
    }

    /// Claims a shard that must be there.
    ///
    /// # Errors
    /// When there is none.
    pub async fn lease(&self) -> Result<v1::Lease> {
        self.claim().await?.context("there is no work")
    }

    /// A signed submission.
    #[must_use]
    pub fn submission(&self, lease: &v1::Lease, adapter: &Adapter) -> v1::SubmitAdapterRequest {
        let mut request = v1::SubmitAdapterRequest {
            request_id: request_id(),
            lease_id: lease.id.clone(),
            generation: lease.generation,
            adapter: Some(adapter.name().into()),
            adapter_config: adapter.config.clone(),
            numbers: Some(v1::TrainNumbers {
                steps: STEPS,
                tokens: 200,
                scored_tokens: 190,
                seconds: 1.5,
                first_loss: 2.0,
                last_loss: 1.5,
                device: "made up".to_owned(),
            }),
            signature: Vec::new(),
            commitment: commits(lease).then(|| training_of(lease, adapter).commitment()),
        };
        sign_submission(&self.client.identity().key, &lease.nonce, &mut request)
            .expect("the request names an adapter");
        request
    }

    /// Sends a submission as it is.
    ///
    /// # Errors
    /// As the call.
    pub async fn submit(
        &self,
        request: &v1::SubmitAdapterRequest,
    ) -> Result<v1::SubmitAdapterResponse, ClientError> {
        call!(self, work.submit_adapter, request)
    }

    /// Uploads an adapter, submits it, and opens what is audited of it.
    ///
    /// # Errors
    /// As the calls.
    pub async fn hand_in(
        &self,
        lease: &v1::Lease,
        adapter: &Adapter,
    ) -> Result<v1::SubmitAdapterResponse, ClientError> {
        self.upload(&adapter.weights, &lease.id).await?;
        let answer = self.submit(&self.submission(lease, adapter)).await?;
        self.open_audit(lease, adapter, &answer).await?;
        Ok(answer)
    }

    /// The same with training states of the caller's choice.
    ///
    /// # Errors
    /// As the calls.
    pub async fn hand_in_with(
        &self,
        lease: &v1::Lease,
        adapter: &Adapter,
        states: &Training,
    ) -> Result<v1::SubmitAdapterResponse, ClientError> {
        self.upload(&adapter.weights, &lease.id).await?;
        let mut request = self.submission(lease, adapter);
        request.commitment = Some(states.commitment());
        sign_submission(&self.client.identity().key, &lease.nonce, &mut request)
            .expect("the request names an adapter");
        let answer = self.submit(&request).await?;
        self.open_with(lease, states, &answer).await?;
        Ok(answer)
    }

    /// Opens what an answer asks for, if it asks.
    ///
    /// # Errors
    /// As the calls.
    pub async fn open_audit(
        &self,
        lease: &v1::Lease,
        adapter: &Adapter,
        answer: &v1::SubmitAdapterResponse,
    ) -> Result<(), ClientError> {
        self.open_with(lease, &training_of(lease, adapter), answer)
            .await
    }

    async fn open_with(
        &self,
        lease: &v1::Lease,
        states: &Training,
        answer: &v1::SubmitAdapterResponse,
    ) -> Result<(), ClientError> {
        let Some(audit) = &answer.audit else {
            return Ok(());
        };
        let (request, files) = states.opening(&answer.submission_id, audit.segment);
        for file in files {
            self.upload(file, &lease.id).await?;
        }
        self.reveal(&request).await
    }

    /// Opens training states.
    ///
    /// # Errors
    /// As the call.
    pub async fn reveal(&self, request: &v1::RevealAuditRequest) -> Result<(), ClientError> {
        call!(self, work.reveal_audit, request).map(|_| ())
    }

    /// Hands in again what the coordinator has lost. Whether it had.
    ///
    /// # Errors
    /// As the call.
    pub async fn restore(
        &self,
        receipt: &v1::Receipt,
        submission: &v1::SubmitAdapterRequest,
    ) -> Result<bool, ClientError> {
        let request = v1::RestoreSubmissionRequest {
            receipt: Some(receipt.clone()),
            submission: Some(submission.clone()),
        };
        Ok(call!(self, volunteer.restore_submission, request)?.restored)
    }

    /// Extends a lease.
    ///
    /// # Errors
    /// As the call.
    pub async fn renew(&self, lease: &v1::Lease) -> Result<i64, ClientError> {
        let request = v1::RenewLeaseRequest {
            lease_id: lease.id.clone(),
            generation: lease.generation,
            step: 1,
            steps: 3,
            loss: Some(2.0),
        };
        Ok(call!(self, work.renew_lease, request)?.expires_ms)
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// As the call.
    pub async fn release(&self, lease: &v1::Lease, failed: bool) -> Result<(), ClientError> {
        let request = v1::ReleaseLeaseRequest {
            lease_id: lease.id.clone(),
            generation: lease.generation,
            failed,
            detail: "out of memory".to_owned(),
        };
        call!(self, work.release_lease, request).map(|_| ())
    }

    /// The caller's submissions, newest first.
    ///
    /// # Errors
    /// As the call.
    pub async fn submissions(&self) -> Result<Vec<v1::Contribution>, ClientError> {
        let request = v1::ListSubmissionsRequest::default();
        let answer = call!(self, volunteer.list_submissions, request)?;
        Ok(answer
            .submissions
            .into_iter()
            .filter_map(|own| own.contribution)
            .collect())
    }

    /// What became of the newest submission: its verdict and, when rejected, the reason.
    ///
    /// # Errors
    /// When there is none.
    pub async fn verdict(&self) -> Result<(v1::Verdict, String)> {
        let submissions = self.submissions().await?;
        let newest = submissions.first().context("nothing was submitted")?;
        Ok((newest.verdict(), newest.reason.clone()))
    }

    /// What the coordinator counts.
    ///
    /// # Errors
    /// As the call.
    pub async fn standing(&self) -> Result<v1::GetStandingResponse, ClientError> {
        call!(self, volunteer.get_standing, v1::GetStandingRequest {})
    }
}

/// What maintainers do.
impl Member {
    /// Makes a join token and returns its URL.
    ///
    /// # Errors
    /// As the call.
    pub async fn create_token(
        &self,
        role: v1::Role,
        uses: u32,
        ttl_ms: i64,
    ) -> Result<String, ClientError> {
        let request = v1::CreateJoinTokenRequest {
            role: role.into(),
            uses,
            ttl_ms,
        };
        Ok(call!(self, enrollment.create_join_token, request)?.join_url)
    }

    /// Uploads a folder and makes it a model.
    ///
    /// # Errors
    /// As the calls.
    pub async fn add_model(&self, name: &str, dir: &Path) -> Result<v1::Model> {
        let mut files = Vec::new();
        for path in list_files(dir)? {
            let entry = FileEntry::of_file(dir, &path)?;
            let blob = self.upload(&std::fs::read(dir.join(&path))?, "").await?;
            files.push(v1::File {
                path,
                blob: Some(blob.into()),
                sha256: entry.sha256,
            });
        }
        self.create_model(name, files)
            .await?
            .context("an answer without a model")
    }

    /// Makes a model from files that are held.
    ///
    /// # Errors
    /// As the call.
    pub async fn create_model(
        &self,
        name: &str,
        files: Vec<v1::File>,
    ) -> Result<Option<v1::Model>, ClientError> {
        let request = v1::CreateModelRequest {
            name: name.to_owned(),
            files,
            request_id: request_id(),
        };
        Ok(call!(self, models.create_model, request)?.model)
    }

    /// Uploads chunks and makes them a dataset.
    ///
    /// # Errors
    /// As the calls.
    pub async fn add_dataset(
        &self,
        name: &str,
        set: v1::DatasetSet,
        chunks: &[(Vec<u8>, u32)],
    ) -> Result<(), ClientError> {
        let mut wire = Vec::new();
        for (bytes, records) in chunks {
            let blob = Some(self.upload(bytes, "").await?.into());
            wire.push(v1::Chunk {
                blob,
                records: *records,
            });
        }
        let request = v1::CreateDatasetRequest {
            name: name.to_owned(),
            set: set.into(),
            license: "CC0-1.0".to_owned(),
            source: "made by the tests".to_owned(),
            chunks: wire,
            request_id: request_id(),
        };
        call!(self, datasets.create_dataset, request).map(|_| ())
    }

    /// Adds the tiny model and its three sets; the model's folder is left in `dir`.
    ///
    /// # Errors
    /// As the calls.
    pub async fn add_tiny(&self, dir: &Path) -> Result<()> {
        tiny::write_model(dir)?;
        self.add_model(tiny::MODEL, dir).await?;
        for (name, records) in tiny::RECORDS {
            let set = match name {
                tiny::TRAIN => v1::DatasetSet::Train,
                tiny::GATE => v1::DatasetSet::Gate,
                tiny::AUDIT => v1::DatasetSet::Audit,
                other => bail!("{other} is none of the tiny sets"),
            };
            self.add_dataset(name, set, &tiny::chunks(name, records))
                .await?;
        }
        Ok(())
    }

    /// Opens a round and returns its id.
    ///
    /// # Errors
    /// As the call.
    pub async fn open_round(&self, round_file: &str) -> Result<String, ClientError> {
        let round_file = round_file.to_owned();
        let request = v1::CreateRoundRequest {
            round_file,
            request_id: request_id(),
        };
        let round = call!(self, rounds.create_round, request)?.round;
        round
            .map(|round| round.id)
            .ok_or_else(|| ClientError::Malformed("no round".to_owned()))
    }

    /// Aborts a round.
    ///
    /// # Errors
    /// As the call.
    pub async fn abort(&self, id: &str) -> Result<(), ClientError> {
        let request = v1::AbortRoundRequest {
            id: id.to_owned(),
            reason: "changed my mind".to_owned(),
        };
        call!(self, rounds.abort_round, request).map(|_| ())
    }
}
