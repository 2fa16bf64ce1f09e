// Package attest checks the evidence by which an agent proves what it may be, and says what that is.
//
//	Create ─► token ─► (file, prompt) ─► agent ─► Redeem ─► Grant: the agent's ID and the one SPIFFE ID that it may have
//	certificate and key, or a pod's projected token ─► Attestor ─► Evidence: the agent's ID, its selectors, its entry
//
// A token has 256 random bits, serves one agent key once, and ends after 15 minutes by default. Only its hash is stored,
// and no ID or log reveals it. A wrong, tampered, used or expired token is refused with an error that says which.
// An Attestor reads foreign bytes, bounded; what it does not accept is ErrRefused, what it could not find out is not.
package attest
