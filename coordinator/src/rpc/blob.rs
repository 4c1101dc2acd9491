//! `cairn.v1.BlobService`.
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
use crate::blobs::ByteStream;
use crate::error::Error;
use crate::ids::LeaseId;
use crate::limits;
use crate::ops::find_blobs::find_missing;
use crate::ops::read_blob::read_blob;
use crate::ops::write_blob::{UploadHeader, query_write_status, write_blob};

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
    let lease = if header.lease_id.is_empty() {
        None
    } else {
        Some(LeaseId::from_field("lease_id", &header.lease_id)?)
    };
    Ok(UploadHeader {
        name: convert::blob("header.blob", header.blob.as_ref())?,
        offset: header.offset,
        lease,
    })
}
