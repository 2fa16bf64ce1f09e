// Package join is how a cluster enters a mesh: mesh tokens, and the gRPC service hanse.join.v1 of the federation port.
//
//	issuer: Server.CreateToken ─► hns1_… ─► (a person) ─► joiner: Dial ─► Preview, Redeem, Confirm
//
// The joiner sends the secret only after the server's chain ends in a root that the token pins and names a control plane. The issuer
// stores a hash of the secret, and believes the joiner's bundle because the client certificate of the connection verifies
// against it. Redeem binds the token to (member ID, bundle) in one transaction: that joiner may repeat it, anyone else is told
// that it is used. After a crash each side is nothing, joining or member, and the same join finishes it.
package join
