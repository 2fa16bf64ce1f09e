// Package joinpb is hanse.join.v1, the service by which a stranger becomes a member.
package joinpb
