//! A coordinator in memory that misbehaves as told.
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cairn_proto::reason::{ErrorReason, status};
use cairn_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use cairn_proto::v1::enrollment_service_server::{EnrollmentService, EnrollmentServiceServer};
use cairn_proto::v1::volunteer_service_server::{VolunteerService, VolunteerServiceServer};
use cairn_proto::v1::write_blob_request::Part;
use cairn_proto::{signing, v1};
use cairn_stack::digest::Digest;
use ed25519_dalek::SigningKey;
use futures::stream::BoxStream;
use tonic::transport::server::Router;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// What the fake holds and how it misbehaves.
#[derive(Clone, Default)]
pub struct Fake {
    /// Blobs by digest; incomplete while shorter than announced.
    pub blobs: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    /// Sessions made so far.
    pub sessions: Arc<AtomicUsize>,
    /// Calls that end with UNAVAILABLE before one succeeds.
    pub failures: Arc<AtomicUsize>,
    /// Streams, either way, that break off after a chunk or two.
    pub cuts: Arc<AtomicUsize>,
    /// Offsets at which uploads and downloads began.
    pub offsets: Arc<Mutex<Vec<u64>>>,
    /// Downloads that bring other bytes of the right length.
    pub lies: Arc<AtomicUsize>,
}

fn spend(counter: &AtomicUsize) -> bool {
    counter
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
        .is_ok()
}

fn no_such_call() -> Status {
    Status::unimplemented("not here")
}

impl Fake {
    /// Only the newest session is good.
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let newest = format!("Bearer session-{}", self.sessions.load(Ordering::SeqCst));
        let shown = request
            .metadata()
            .get("authorization")
            .and_then(|t| t.to_str().ok());
        if shown == Some(newest.as_str()) {
            return Ok(());
        }
        Err(status(
            ErrorReason::SessionExpired,
            "sign on again",
            &[],
            None,
        ))
    }

    fn router(&self, server: Server) -> Router {
        let mut server = server;
        server
            .add_service(EnrollmentServiceServer::new(self.clone()))
            .add_service(BlobServiceServer::new(self.clone()))
            .add_service(VolunteerServiceServer::new(self.clone()))
    }

    /// Serves on a free loopback port; the port.
    pub async fn serve(&self, tls: Option<(&str, &str)>) -> u16 {
        let mut server = Server::builder();
        if let Some((certificate, key)) = tls {
            let identity = Identity::from_pem(certificate, key);
            server = server
                .tls_config(ServerTlsConfig::new().identity(identity))
                .unwrap();
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let router = self.router(server);
        tokio::spawn(async move { router.serve_with_incoming(incoming).await });
        port
    }
}

#[tonic::async_trait]
impl EnrollmentService for Fake {
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        let request = request.into_inner();
        if request.join_token != "good" {
            return Err(status(
                ErrorReason::TokenExpired,
                "the join token has expired",
                &[],
                None,
            ));
        }
        signing::verify_enrolment(&request).map_err(|e| Status::unauthenticated(e.to_string()))?;
        Ok(Response::new(v1::EnrollResponse {
            worker_id: "w1".into(),
            role: v1::Role::Volunteer.into(),
            server_public_key: SigningKey::from_bytes(&[1; 32])
                .verifying_key()
                .to_bytes()
                .to_vec(),
        }))
    }

    async fn create_challenge(
        &self,
        _: Request<v1::CreateChallengeRequest>,
    ) -> Result<Response<v1::CreateChallengeResponse>, Status> {
        Ok(Response::new(v1::CreateChallengeResponse {
            challenge: vec![7; 32],
        }))
    }

    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Result<Response<v1::CreateSessionResponse>, Status> {
        let request = request.into_inner();
        signing::verify_session(&request).map_err(|e| Status::unauthenticated(e.to_string()))?;
        let number = self.sessions.fetch_add(1, Ordering::SeqCst) + 1;
        Ok(Response::new(v1::CreateSessionResponse {
            session_token: format!("session-{number}"),
            ..Default::default()
        }))
    }

    async fn create_join_token(
        &self,
        _: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::CreateJoinTokenResponse>, Status> {
        Err(no_such_call())
    }
}

#[tonic::async_trait]
impl VolunteerService for Fake {
    async fn get_standing(
        &self,
        request: Request<v1::GetStandingRequest>,
    ) -> Result<Response<v1::GetStandingResponse>, Status> {
        self.check(&request)?;
        if spend(&self.failures) {
            return Err(status(ErrorReason::ShuttingDown, "draining", &[], None));
        }
        Ok(Response::new(v1::GetStandingResponse {
            accepted: 3,
            ..Default::default()
        }))
    }

    async fn list_submissions(
        &self,
        _: Request<v1::ListSubmissionsRequest>,
    ) -> Result<Response<v1::ListSubmissionsResponse>, Status> {
        Err(status(
            ErrorReason::NotFound,
            "there is none",
            &[("kind", "submission")],
            None,
        ))
    }

    async fn restore_submission(
        &self,
        _: Request<v1::RestoreSubmissionRequest>,
    ) -> Result<Response<v1::RestoreSubmissionResponse>, Status> {
        Err(Status::unimplemented("not part of this test"))
    }
}

#[tonic::async_trait]
impl BlobService for Fake {
    async fn find_missing_blobs(
        &self,
        request: Request<v1::FindMissingBlobsRequest>,
    ) -> Result<Response<v1::FindMissingBlobsResponse>, Status> {
        self.check(&request)?;
        let blobs = self.blobs.lock().unwrap();
        let missing = request
            .into_inner()
            .blobs
            .into_iter()
            .filter(|b| !blobs.contains_key(&b.digest));
        Ok(Response::new(v1::FindMissingBlobsResponse {
            missing: missing.collect(),
        }))
    }

    async fn query_write_status(
        &self,
        request: Request<v1::QueryWriteStatusRequest>,
    ) -> Result<Response<v1::QueryWriteStatusResponse>, Status> {
        self.check(&request)?;
        let blob = request.into_inner().blob.unwrap();
        let held = self
            .blobs
            .lock()
            .unwrap()
            .get(&blob.digest)
            .map_or(0, Vec::len) as u64;
        Ok(Response::new(v1::QueryWriteStatusResponse {
            committed_bytes: held,
            complete: held == blob.size_bytes,
        }))
    }

    async fn write_blob(
        &self,
        request: Request<Streaming<v1::WriteBlobRequest>>,
    ) -> Result<Response<v1::WriteBlobResponse>, Status> {
        self.check(&request)?;
        let mut stream = request.into_inner();
        let first = stream.message().await?.and_then(|message| message.part);
        let Some(Part::Header(header)) = first else {
            return Err(Status::invalid_argument("no header"));
        };
        self.offsets.lock().unwrap().push(header.offset);
        let blob = header.blob.unwrap();
        let cut = spend(&self.cuts);
        while let Some(message) = stream.message().await? {
            let Some(Part::Chunk(chunk)) = message.part else {
                return Err(Status::invalid_argument("a second header"));
            };
            let mut blobs = self.blobs.lock().unwrap();
            blobs.entry(blob.digest.clone()).or_default().extend(chunk);
            if cut {
                return Err(status(ErrorReason::Unavailable, "cut", &[], None));
            }
        }
        let blobs = self.blobs.lock().unwrap();
        let held = &blobs[&blob.digest];
        if held.len() as u64 == blob.size_bytes && Digest::of(held).to_string() != blob.digest {
            return Err(status(
                ErrorReason::DigestMismatch,
                "other bytes",
                &[],
                None,
            ));
        }
        Ok(Response::new(v1::WriteBlobResponse {
            committed_bytes: held.len() as u64,
            complete: held.len() as u64 == blob.size_bytes,
        }))
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
        self.check(&request)?;
        let request = request.into_inner();
        self.offsets.lock().unwrap().push(request.offset);
        let blob = request.blob.unwrap();
        let Some(mut bytes) = self.blobs.lock().unwrap().get(&blob.digest).cloned() else {
            return Err(status(
                ErrorReason::NotFound,
                "no such blob",
                &[("kind", "blob")],
                None,
            ));
        };
        if spend(&self.lies) {
            bytes[0] ^= 1;
        }
        let mut parts: Vec<Result<v1::ReadBlobResponse, Status>> = bytes[request.offset as usize..]
            .chunks(100_000)
            .map(|chunk| {
                Ok(v1::ReadBlobResponse {
                    chunk: chunk.to_vec(),
                })
            })
            .collect();
        if spend(&self.cuts) {
            parts.truncate(2);
            parts.push(Err(status(ErrorReason::Unavailable, "cut", &[], None)));
        }
        Ok(Response::new(Box::pin(futures::stream::iter(parts))))
    }
}
