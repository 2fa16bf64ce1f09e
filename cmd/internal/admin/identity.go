package admin

import (
	"encoding/json"
	"time"
)

// Identity is one SPIFFE ID of this cluster's trust domain, as `hanse identity list -o json` shows it.
type Identity struct {
	ID       string          `json:"id"`
	Services []string        `json:"services"` // that endpoints with this ID serve here
	Entries  []IdentityEntry `json:"entries"`  // that entitle agents to it; none for agents themselves
	Agents   []IdentityAgent `json:"agents"`   // that may have SVIDs for it signed; for an agent's ID, itself
}

// IdentityEntry is a registration entry, as of the SPIRE Server API.
type IdentityEntry struct {
	ID            string     `json:"id"`
	Parent        string     `json:"parent"`    // SPIFFE ID of the agent, or of the group of agents
	Selectors     []string   `json:"selectors"` // "type:value"
	FederatesWith []string   `json:"federatesWith,omitempty"`
	DNSNames      []string   `json:"dnsNames,omitempty"`
	Hint          string     `json:"hint,omitempty"`
	Admin         bool       `json:"admin,omitempty"`
	Downstream    bool       `json:"downstream,omitempty"`
	X509Life      float64    `json:"x509Life,omitempty"` // seconds; 0 is the authority's
	Expires       *time.Time `json:"expires,omitempty"`
}

// IdentityAgent is an agent that has attested.
type IdentityAgent struct {
	ID      string    `json:"id"`
	Type    string    `json:"type"`           // of attestation
	Expires time.Time `json:"expires"`        // its own SVID
	Seen    *float64  `json:"seen,omitempty"` // seconds since its last call to this replica
	Banned  bool      `json:"banned,omitempty"`
}

// MintRequest asks for an SVID by hand: X.509 for PublicKey, or a JWT for Audience.
type MintRequest struct {
	ID        string   `json:"id"`
	PublicKey []byte   `json:"publicKey,omitempty"` // PKIX DER
	DNSNames  []string `json:"dnsNames,omitempty"`
	Audience  []string `json:"audience,omitempty"`
	TTL       float64  `json:"ttl,omitempty"` // seconds; 0 is the authority's
}

// Minted is the answer. The token is a secret.
type Minted struct {
	ID      string          `json:"id"`
	Chain   [][]byte        `json:"chain,omitempty"` // DER, leaf first
	Bundle  json.RawMessage `json:"bundle,omitempty"`
	Token   string          `json:"token,omitempty"`
	Expires time.Time       `json:"expires"`
}
