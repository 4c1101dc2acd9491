//! A coordinator in memory that hands out the work it is given and remembers what is handed in.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use cairn_proto::reason::{ErrorReason, status};
use cairn_proto::signing::{self, ReceiptStatement};
use cairn_proto::v1;
use cairn_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use cairn_proto::v1::enrollment_service_server::{EnrollmentService, EnrollmentServiceServer};
use cairn_proto::v1::volunteer_service_server::{VolunteerService, VolunteerServiceServer};
use cairn_proto::v1::work_service_server::{WorkService, WorkServiceServer};
use cairn_proto::v1::write_blob_request::Part;
use cairn_stack::digest::Digest;
use ed25519_dalek::SigningKey;
use futures::stream::BoxStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// The nonce of every lease.
pub const NONCE: &[u8] = &[5; 32];

/// What it holds and remembers.
#[derive(Default)]
pub struct World {
    /// Blobs by digest.
    pub blobs: HashMap<String, Vec<u8>>,
    /// Public keys by worker.
    pub keys: HashMap<String, Vec<u8>>,
    /// Work to hand out, first first, to whoever asks.
    pub work: VecDeque<v1::lease::Work>,
    /// Asked for with every acknowledgement.
    pub audit: Option<v1::AuditRequest>,
    /// What `ListSubmissions` shows.
    pub listed: Vec<v1::OwnSubmission>,
    /// Blobs that were uploaded, with the lease they came under.
    pub uploads: Vec<(String, String)>,
    /// What was handed in.
    pub submitted: Vec<v1::SubmitAdapterRequest>,
    /// Audits answered.
    pub revealed: Vec<v1::RevealAuditRequest>,
    /// Scores handed in.
    pub scores: Vec<v1::SubmitScoresRequest>,
    /// Findings handed in.
    pub findings: Vec<v1::SubmitFindingsRequest>,
    /// Work given back, with the detail.
    pub released: Vec<String>,
    /// Submissions handed in again.
    pub restored: Vec<v1::RestoreSubmissionRequest>,
    leases: u64,
}

impl World {
    /// Holds some bytes.
    pub fn hold(&mut self, bytes: &[u8]) -> v1::BlobRef {
        let digest = Digest::of(bytes).to_string();
        self.blobs.insert(digest.clone(), bytes.to_vec());
        v1::BlobRef {
            digest,
            size_bytes: bytes.len() as u64,
        }
    }

    /// Holds a file.
    pub fn hold_file(&mut self, path: &Path) -> v1::BlobRef {
        self.hold(&std::fs::read(path).unwrap())
    }
}

/// The key that signs receipts.
pub fn server_key() -> SigningKey {
    SigningKey::from_bytes(&[9; 32])
}

/// The receipt of a submission.
pub fn receipt(request: &v1::SubmitAdapterRequest, id: &str, verdict: &str) -> v1::Receipt {
    let adapter = request.adapter.clone().unwrap();
    let statement = ReceiptStatement {
        submission: id.to_owned(),
        lease: request.lease_id.clone(),
        worker: "volunteer".to_owned(),
        round: "r".to_owned(),
        shard: 2,
        adapter: adapter.digest.parse().unwrap(),
        adapter_bytes: adapter.size_bytes,
        received_ms: 1,
        verdict: verdict.to_owned(),
        reason: String::new(),
        credit_tokens: 0,
        log_index: 0,
    };
    statement.sign(&server_key()).unwrap()
}

/// The coordinator.
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<World>>);

impl Fake {
    /// Its world, locked.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    /// Serves on a free loopback port; the port.
    pub async fn serve(&self) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let router = Server::builder()
            .add_service(EnrollmentServiceServer::new(self.clone()))
            .add_service(BlobServiceServer::new(self.clone()))
            .add_service(VolunteerServiceServer::new(self.clone()))
            .add_service(WorkServiceServer::new(self.clone()));
        tokio::spawn(async move { router.serve_with_incoming(incoming).await });
        port
    }
}

fn answer<T>(message: T) -> Result<Response<T>, Status> {
    Ok(Response::new(message))
}

fn refusal(reason: ErrorReason) -> Status {
    status(reason, reason.sentence(), &[], None)
}

fn no_such_call() -> Status {
    Status::unimplemented("not here")
}

#[tonic::async_trait]
impl EnrollmentService for Fake {
    /// The join token says the role, which is the worker's id too.
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        let request = request.into_inner();
        let role = match request.join_token.as_str() {
            "volunteer" => v1::Role::Volunteer,
            _ => v1::Role::Evaluator,
        };
        let worker_id = request.join_token.clone();
        self.world()
            .keys
            .insert(worker_id.clone(), request.public_key);
        answer(v1::EnrollResponse {
            worker_id,
            role: role.into(),
            server_public_key: server_key().verifying_key().to_bytes().to_vec(),
        })
    }

    async fn create_challenge(
        &self,
        _: Request<v1::CreateChallengeRequest>,
    ) -> Result<Response<v1::CreateChallengeResponse>, Status> {
        answer(v1::CreateChallengeResponse {
            challenge: vec![7; 32],
        })
    }

    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Result<Response<v1::CreateSessionResponse>, Status> {
        signing::verify_session(request.get_ref())
            .map_err(|error| Status::unauthenticated(error.to_string()))?;
        answer(v1::CreateSessionResponse {
            session_token: "session".to_owned(),
            ..Default::default()
        })
    }

    async fn create_join_token(
        &self,
        _: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::CreateJoinTokenResponse>, Status> {
        Err(no_such_call())
    }
}

#[tonic::async_trait]
impl WorkService for Fake {
    async fn claim_work(
        &self,
        _: Request<v1::ClaimWorkRequest>,
    ) -> Result<Response<v1::ClaimWorkResponse>, Status> {
        let lease = {
            let mut world = self.world();
            world.leases += 1;
            let id = format!("lease-{}", world.leases);
            world.work.pop_front().map(|work| v1::Lease {
                id,
                nonce: NONCE.to_vec(),
                generation: 1,
                expires_ms: i64::MAX,
                work: Some(work),
            })
        };
        if lease.is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        answer(v1::ClaimWorkResponse { lease })
    }

    async fn renew_lease(
        &self,
        _: Request<v1::RenewLeaseRequest>,
    ) -> Result<Response<v1::RenewLeaseResponse>, Status> {
        answer(v1::RenewLeaseResponse {
            expires_ms: i64::MAX,
        })
    }

    async fn release_lease(
        &self,
        request: Request<v1::ReleaseLeaseRequest>,
    ) -> Result<Response<v1::ReleaseLeaseResponse>, Status> {
        self.world().released.push(request.into_inner().detail);
        answer(v1::ReleaseLeaseResponse {})
    }

    async fn submit_adapter(
        &self,
        request: Request<v1::SubmitAdapterRequest>,
    ) -> Result<Response<v1::SubmitAdapterResponse>, Status> {
        let request = request.into_inner();
        let mut world = self.world();
        let adapter = request.adapter.clone().unwrap();
        if !world.blobs.contains_key(&adapter.digest) {
            return Err(refusal(ErrorReason::BlobMissing));
        }
        signing::verify_submission(&world.keys["volunteer"], NONCE, &request)
            .map_err(|_| refusal(ErrorReason::BadSignature))?;
        let id = format!("submission-{}", world.submitted.len() + 1);
        let receipt = receipt(&request, &id, "pending");
        let audit = world.audit;
        world.listed.push(v1::OwnSubmission {
            round_id: "r".to_owned(),
            contribution: Some(v1::Contribution {
                id: id.clone(),
                verdict: v1::Verdict::Pending.into(),
                ..Default::default()
            }),
            receipt: Some(receipt.clone()),
            audit,
        });
        world.submitted.push(request);
        answer(v1::SubmitAdapterResponse {
            submission_id: id,
            receipt: Some(receipt),
            audit,
        })
    }

    async fn submit_scores(
        &self,
        request: Request<v1::SubmitScoresRequest>,
    ) -> Result<Response<v1::SubmitScoresResponse>, Status> {
        self.world().scores.push(request.into_inner());
        answer(v1::SubmitScoresResponse {})
    }

    async fn submit_findings(
        &self,
        request: Request<v1::SubmitFindingsRequest>,
    ) -> Result<Response<v1::SubmitFindingsResponse>, Status> {
        let mut world = self.world();
        signing::verify_findings(&world.keys["evaluator"], NONCE, request.get_ref())
            .map_err(|_| refusal(ErrorReason::BadSignature))?;
        world.findings.push(request.into_inner());
        answer(v1::SubmitFindingsResponse {})
    }

    async fn reveal_audit(
        &self,
        request: Request<v1::RevealAuditRequest>,
    ) -> Result<Response<v1::RevealAuditResponse>, Status> {
        let mut world = self.world();
        let request = request.into_inner();
        let end = request.end.clone().unwrap().factors.unwrap();
        if !world.blobs.contains_key(&end.digest) {
            return Err(refusal(ErrorReason::BlobMissing));
        }
        for own in &mut world.listed {
            own.audit = None;
        }
        world.revealed.push(request);
        answer(v1::RevealAuditResponse {})
    }
}

#[tonic::async_trait]
impl VolunteerService for Fake {
    async fn get_standing(
        &self,
        _: Request<v1::GetStandingRequest>,
    ) -> Result<Response<v1::GetStandingResponse>, Status> {
        answer(v1::GetStandingResponse {
            strikes: 1,
            audit_share: 0.2,
            ..Default::default()
        })
    }

    async fn list_submissions(
        &self,
        _: Request<v1::ListSubmissionsRequest>,
    ) -> Result<Response<v1::ListSubmissionsResponse>, Status> {
        answer(v1::ListSubmissionsResponse {
            submissions: self.world().listed.clone(),
            next_page_token: String::new(),
        })
    }

    async fn restore_submission(
        &self,
        request: Request<v1::RestoreSubmissionRequest>,
    ) -> Result<Response<v1::RestoreSubmissionResponse>, Status> {
        let request = request.into_inner();
        let receipt = request.receipt.clone().unwrap();
        ReceiptStatement::verify(&receipt, server_key().verifying_key().as_bytes())
            .map_err(|_| refusal(ErrorReason::BadSignature))?;
        let mut world = self.world();
        let adapter = request.submission.clone().unwrap().adapter.unwrap();
        if !world.blobs.contains_key(&adapter.digest) {
            return Err(refusal(ErrorReason::BlobMissing));
        }
        let restored = world.restored.is_empty();
        world.restored.push(request);
        answer(v1::RestoreSubmissionResponse { restored })
    }
}

#[tonic::async_trait]
impl BlobService for Fake {
    async fn find_missing_blobs(
        &self,
        _: Request<v1::FindMissingBlobsRequest>,
    ) -> Result<Response<v1::FindMissingBlobsResponse>, Status> {
        Err(no_such_call())
    }

    async fn query_write_status(
        &self,
        request: Request<v1::QueryWriteStatusRequest>,
    ) -> Result<Response<v1::QueryWriteStatusResponse>, Status> {
        let blob = request.into_inner().blob.unwrap();
        let complete = self.world().blobs.contains_key(&blob.digest);
        answer(v1::QueryWriteStatusResponse {
            committed_bytes: if complete { blob.size_bytes } else { 0 },
            complete,
        })
    }

    async fn write_blob(
        &self,
        request: Request<Streaming<v1::WriteBlobRequest>>,
    ) -> Result<Response<v1::WriteBlobResponse>, Status> {
        let mut stream = request.into_inner();
        let (mut header, mut bytes) = (None, Vec::new());
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(Part::Header(first)) => header = Some(first),
                Some(Part::Chunk(chunk)) => bytes.extend(chunk),
                None => (),
            }
        }
        let header = header.ok_or_else(|| Status::invalid_argument("no header"))?;
        let mut world = self.world();
        let held = world.hold(&bytes);
        if header.blob.as_ref() != Some(&held) {
            return Err(refusal(ErrorReason::DigestMismatch));
        }
        world.uploads.push((held.digest, header.lease_id));
        answer(v1::WriteBlobResponse {
            committed_bytes: held.size_bytes,
            complete: true,
        })
    }

    async fn begin_upload(
        &self,
        _: Request<v1::BeginUploadRequest>,
    ) -> Result<Response<v1::BeginUploadResponse>, Status> {
        Err(Status::unimplemented("older than direct transfers"))
    }

    type CompleteUploadStream = BoxStream<'static, Result<v1::CompleteUploadResponse, Status>>;

    async fn complete_upload(
        &self,
        _: Request<v1::CompleteUploadRequest>,
    ) -> Result<Response<Self::CompleteUploadStream>, Status> {
        Err(Status::unimplemented("older than direct transfers"))
    }

    async fn get_blob_url(
        &self,
        _: Request<v1::GetBlobUrlRequest>,
    ) -> Result<Response<v1::GetBlobUrlResponse>, Status> {
        Err(Status::unimplemented("older than direct transfers"))
    }

    type ReadBlobStream = BoxStream<'static, Result<v1::ReadBlobResponse, Status>>;

    async fn read_blob(
        &self,
        request: Request<v1::ReadBlobRequest>,
    ) -> Result<Response<Self::ReadBlobStream>, Status> {
        let request = request.into_inner();
        let world = self.world();
        let bytes = world.blobs.get(&request.blob.unwrap().digest);
        let bytes = bytes.ok_or_else(|| refusal(ErrorReason::NotFound))?;
        let parts: Vec<_> = bytes[request.offset as usize..]
            .chunks(100_000)
            .map(<[u8]>::to_vec)
            .map(|chunk| Ok(v1::ReadBlobResponse { chunk }))
            .collect();
        answer(Box::pin(futures::stream::iter(parts)) as Self::ReadBlobStream)
    }
}
