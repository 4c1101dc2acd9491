//! `cairn.v1.LogService`.
use cairn_proto::v1;
use cairn_proto::v1::log_service_server::LogService;
use cairn_stack::merkle::Hash;
use tonic::{Request, Response, Status};

use super::auth::caller;
use crate::app::App;
use crate::ops::read_log::{
    ENTRIES_MAX, get_consistency_proof, get_inclusion_proof, get_tree_head, list_entries,
};

/// The service.
pub struct Log(pub App);

#[tonic::async_trait]
impl LogService for Log {
    async fn get_tree_head(
        &self,
        request: Request<v1::GetTreeHeadRequest>,
    ) -> Result<Response<v1::GetTreeHeadResponse>, Status> {
        caller(&request)?;
        let head = Some(get_tree_head(&self.0).await?);
        Ok(Response::new(v1::GetTreeHeadResponse { head }))
    }

    async fn list_entries(
        &self,
        request: Request<v1::ListEntriesRequest>,
    ) -> Result<Response<v1::ListEntriesResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let limit = u32::try_from(request.page_size).unwrap_or(0);
        let limit = if limit == 0 { ENTRIES_MAX } else { limit };
        let entries = list_entries(&self.0, request.first, limit).await?;
        let entries = entries.into_iter().map(|entry| v1::LogEntry {
            index: entry.index,
            kind: entry.kind,
            body: entry.body.into_bytes(),
        });
        let entries = entries.collect();
        Ok(Response::new(v1::ListEntriesResponse { entries }))
    }

    async fn get_inclusion_proof(
        &self,
        request: Request<v1::GetInclusionProofRequest>,
    ) -> Result<Response<v1::GetInclusionProofResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let nodes = get_inclusion_proof(&self.0, request.index, request.size).await?;
        let nodes = to_wire(nodes);
        Ok(Response::new(v1::GetInclusionProofResponse { nodes }))
    }

    async fn get_consistency_proof(
        &self,
        request: Request<v1::GetConsistencyProofRequest>,
    ) -> Result<Response<v1::GetConsistencyProofResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let nodes = get_consistency_proof(&self.0, request.old_size, request.new_size).await?;
        let nodes = to_wire(nodes);
        Ok(Response::new(v1::GetConsistencyProofResponse { nodes }))
    }
}

fn to_wire(nodes: Vec<Hash>) -> Vec<Vec<u8>> {
    nodes.into_iter().map(|node| node.to_vec()).collect()
}
