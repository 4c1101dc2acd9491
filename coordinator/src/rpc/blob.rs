//! `cairn.v1.BlobService`.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use cairn_proto::convert::{self, BlobName};
use cairn_proto::limits::FIND_MISSING_MAX;
use cairn_proto::v1;
use cairn_proto::v1::blob_service_server::BlobService;
use cairn_proto::v1::write_blob_request::Part;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::auth::caller;
use crate::app::App;
use crate::blobs::{self, ByteStream, SignedRequest};
use crate::error::Error;
use crate::ids::LeaseId;
use crate::limits;
use crate::ops::begin_upload::{Plan, begin_upload};
use crate::ops::complete_upload::complete_upload;
use crate::ops::find_blobs::find_missing;
use crate::ops::read_blob::read_blob;
use crate::ops::sign_read::sign_read;
use crate::ops::write_blob::{Progress, UploadHeader, query_write_status, write_blob};

/// The service.
pub struct Blob(pub App);

#[tonic::async_trait]
impl BlobService for Blob {
    async fn find_missing_blobs(
        &self,
        request: Request<v1::FindMissingBlobsRequest>,
    ) -> Result<Response<v1::FindMissingBlobsResponse>, Status> {
        let caller = caller(&request)?;
        let blobs = &request.get_ref().blobs;
        if blobs.len() > FIND_MISSING_MAX {
            return Err(Error::invalid("blobs", format!("at most {FIND_MISSING_MAX}")).into());
        }
        let names: Vec<BlobName> = blobs
            .iter()
            .map(|blob| BlobName::try_from(blob).map_err(Error::from))
            .collect::<Result<_, _>>()?;
        let missing = find_missing(&self.0, &caller, names).await?;
        let missing = missing.into_iter().map(Into::into).collect();
        Ok(Response::new(v1::FindMissingBlobsResponse { missing }))
    }

    async fn query_write_status(
        &self,
        request: Request<v1::QueryWriteStatusRequest>,
    ) -> Result<Response<v1::QueryWriteStatusResponse>, Status> {
        let caller = caller(&request)?;
        let name = convert::blob("blob", request.get_ref().blob.as_ref()).map_err(Error::from)?;
        let progress = query_write_status(&self.0, &caller, name).await?;
        Ok(Response::new(v1::QueryWriteStatusResponse {
            committed_bytes: progress.committed_bytes,
            complete: progress.complete,
        }))
    }

    async fn write_blob(
        &self,
        request: Request<Streaming<v1::WriteBlobRequest>>,
    ) -> Result<Response<v1::WriteBlobResponse>, Status> {
        let caller = caller(&request)?;
        let mut stream = request.into_inner();
        let first = tokio::time::timeout(self.0.limits.stream_idle, stream.message())
            .await
            .map_err(|_| Error::unavailable("no header came for too long"))??;
        let header = header(first)?;
        let chunks = stream.map(|message| match message {
            Ok(v1::WriteBlobRequest {
                part: Some(Part::Chunk(chunk)),
            }) => Ok(Bytes::from(chunk)),
            Ok(_) => Err(Error::invalid("part", "after the header come chunks")),
            // The client broke off: what has arrived stays.
            Err(status) => Err(Error::unavailable("the upload broke off").with_source(status)),
        });
        let progress = write_blob(&self.0, &caller, header, chunks).await?;
        Ok(Response::new(v1::WriteBlobResponse {
            committed_bytes: progress.committed_bytes,
            complete: progress.complete,
        }))
    }

    type ReadBlobStream = ReceiverStream<Result<v1::ReadBlobResponse, Status>>;

    async fn read_blob(
        &self,
        request: Request<v1::ReadBlobRequest>,
    ) -> Result<Response<Self::ReadBlobStream>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let name = convert::blob("blob", request.blob.as_ref()).map_err(Error::from)?;
        let bytes = read_blob(&self.0, &caller, name, request.offset).await?;
        let (sender, receiver) = mpsc::channel(limits::READ_AHEAD_CHUNKS);
        let idle = self.0.limits.stream_idle;
        self.0.lifecycle.spawn(forward(bytes, sender, idle));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn begin_upload(
        &self,
        request: Request<v1::BeginUploadRequest>,
    ) -> Result<Response<v1::BeginUploadResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.get_ref();
        let name = convert::blob("blob", request.blob.as_ref()).map_err(Error::from)?;
        let lease = lease(&request.lease_id)?;
        let answer = match begin_upload(&self.0, &caller, name, lease).await? {
            Plan::Held => v1::BeginUploadResponse {
                complete: true,
                committed_bytes: name.size_bytes,
                ..Default::default()
            },
            Plan::Indirect => v1::BeginUploadResponse::default(),
            Plan::Parts {
                committed_bytes,
                next,
            } => v1::BeginUploadResponse {
                complete: false,
                direct: true,
                committed_bytes,
                parts: next.into_iter().map(part).collect(),
            },
        };
        Ok(Response::new(answer))
    }

    type CompleteUploadStream = ReceiverStream<Result<v1::CompleteUploadResponse, Status>>;

    async fn complete_upload(
        &self,
        request: Request<v1::CompleteUploadRequest>,
    ) -> Result<Response<Self::CompleteUploadStream>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let name = convert::blob("blob", request.blob.as_ref()).map_err(Error::from)?;
        let lease = lease(&request.lease_id)?;
        let (sender, receiver) = mpsc::channel(1);
        let app = self.0.clone();
        self.0.lifecycle.spawn(async move {
            let checked = Arc::default();
            let work = complete_upload(&app, &caller, name, lease, Arc::clone(&checked));
            report(work, checked, &sender).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_blob_url(
        &self,
        request: Request<v1::GetBlobUrlRequest>,
    ) -> Result<Response<v1::GetBlobUrlResponse>, Status> {
        let caller = caller(&request)?;
        let name = convert::blob("blob", request.get_ref().blob.as_ref()).map_err(Error::from)?;
        let get = sign_read(&self.0, &caller, name).await?;
        Ok(Response::new(v1::GetBlobUrlResponse {
            get: get.map(signed),
        }))
    }
}

/// Passes on how far the check of an upload is, and what came of it; ends it when nobody listens.
async fn report(
    work: impl Future<Output = Result<Progress, Error>>,
    checked: Arc<AtomicU64>,
    sender: &mpsc::Sender<Result<v1::CompleteUploadResponse, Status>>,
) {
    let mut work = std::pin::pin!(work);
    loop {
        let (message, ended) = tokio::select! {
            done = work.as_mut() => (done, true),
            () = sender.closed() => return,
            () = tokio::time::sleep(limits::CHECK_REPORT) => {
                let committed_bytes = checked.load(Ordering::Relaxed);
                (Ok(Progress { committed_bytes, complete: false }), false)
            }
        };
        let message = message
            .map(|progress| v1::CompleteUploadResponse {
                committed_bytes: progress.committed_bytes,
                complete: progress.complete,
            })
            .map_err(Status::from);
        if sender.send(message).await.is_err() || ended {
            return;
        }
    }
}

fn part((part, request): (blobs::Part, SignedRequest)) -> v1::begin_upload_response::Part {
    v1::begin_upload_response::Part {
        offset: part.offset,
        size_bytes: part.size_bytes,
        put: Some(signed(request)),
    }
}

fn signed(request: SignedRequest) -> v1::SignedRequest {
    let header = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    v1::SignedRequest {
        url: request.url,
        headers: request.headers.iter().map(header).collect(),
        valid_ms: i64::try_from(request.valid.as_millis()).unwrap_or(i64::MAX),
    }
}

/// Passes pieces on until the reader is gone or takes none for too long.
async fn forward(
    mut bytes: ByteStream,
    sender: mpsc::Sender<Result<v1::ReadBlobResponse, Status>>,
    idle: std::time::Duration,
) {
    while let Some(piece) = bytes.next().await {
        let ended = piece.is_err();
        let message = piece
            .map(|piece| v1::ReadBlobResponse {
                chunk: piece.into(),
            })
            .map_err(Status::from);
        if sender.send_timeout(message, idle).await.is_err() || ended {
            return;
        }
    }
}

fn header(first: Option<v1::WriteBlobRequest>) -> Result<UploadHeader, Error> {
    let Some(v1::WriteBlobRequest {
        part: Some(Part::Header(header)),
    }) = first
    else {
        return Err(Error::invalid(
            "part",
            "the first message carries the header",
        ));
    };
    let lease = lease(&header.lease_id)?;
    Ok(UploadHeader {
        name: convert::blob("header.blob", header.blob.as_ref())?,
        offset: header.offset,
        lease,
    })
}

fn lease(field: &str) -> Result<Option<LeaseId>, Error> {
    (!field.is_empty())
        .then(|| LeaseId::from_field("lease_id", field))
        .transpose()
}
