package admin

import (
	"encoding/json"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
)

// Error is the body of every answer that is not 2xx. It is an error.
type Error struct {
	Status  int    `json:"-"`
	Message string `json:"error"`
	Hint    string `json:"hint,omitempty"`
	// Faults are one per bad field, for apply and validate.
	Faults []Fault `json:"faults,omitempty"`
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Fault is one bad place in a configuration.
type Fault struct {
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Object string `json:"object,omitempty"` // "HTTPRoute shop/payments"
	Field  string `json:"field,omitempty"`  // "spec.rules[0].matches[0].path.value"
	Value  string `json:"value,omitempty"`
	Reason string `json:"reason"` // what is wrong and what to do
}

// Event is one line of a streamed answer.
type Event struct {
	Check *Check          `json:"check,omitempty"` // a fact that was found, good or bad
	Step  string          `json:"step,omitempty"`  // what is being done now
	Data  json.RawMessage `json:"data,omitempty"`  // the operation's own payload
	Done  bool            `json:"done,omitempty"`
	Error *Error          `json:"error,omitempty"`
}

// Check is one line of `join --check`, `status` and `drill plan`.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Warn   bool   `json:"warn,omitempty"` // not OK, but does not fail the whole
	Detail string `json:"detail,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// TokenRequest is POST /v1/tokens. For a mesh token, For names the joining cluster; for an agent token, Workload is
// "namespace/serviceaccount" or "gateway".
type TokenRequest struct {
	For      string  `json:"for,omitempty"`
	Workload string  `json:"workload,omitempty"`
	TTL      float64 `json:"ttlSeconds,omitempty"` // default 900
}

// Token is the answer. It is a secret.
type Token struct {
	Token   string    `json:"token"`
	For     string    `json:"for"`
	Expires time.Time `json:"expires"`
}

// AdminRequest is POST /v1/admins: an X509-SVID for an administrator, whose key stays where it was made.
type AdminRequest struct {
	Name      string  `json:"name"`
	PublicKey []byte  `json:"publicKey"`            // PKIX, DER
	TTL       float64 `json:"ttlSeconds,omitempty"` // default 12 h, at most 7 days
}

// AdminSVID is the answer.
type AdminSVID struct {
	ID      string          `json:"id"`
	Chain   [][]byte        `json:"chain"`             // DER, leaf first
	Bundle  json.RawMessage `json:"bundle"`            // SPIFFE JSON of the cluster's trust domain
	Address string          `json:"address,omitempty"` // where remote administration listens; empty if it is off
	Expires time.Time       `json:"expires"`
}

// JoinRequest is POST /v1/join (streamed) and, with Check, a dry run that changes nothing on either side.
type JoinRequest struct {
	Token string `json:"token"`
	Check bool   `json:"check,omitempty"`
}

// JoinResult is the payload of a finished join.
type JoinResult struct {
	Mesh        string   `json:"mesh"`
	Cluster     string   `json:"cluster"` // the joiner
	Through     string   `json:"through"`
	TrustDomain string   `json:"trustDomain"`
	Members     []string `json:"members"`
	Accepts     []string `json:"accepts,omitempty"` // what this cluster will believe from each, in words
	Imports     int      `json:"imports"`
	Exports     int      `json:"exports"`
}

// LeaveRequest is POST /v1/leave. Member is empty for this cluster itself.
type LeaveRequest struct {
	Member string `json:"member,omitempty"`
	Force  bool   `json:"force,omitempty"`
}

// LeaveResult is the answer.
type LeaveResult struct {
	Member string   `json:"member"`           // the cluster's name
	State  string   `json:"state"`            // left, or proposed when neither the member nor its sponsor said it
	Told   []string `json:"told,omitempty"`   // members that know
	Untold []string `json:"untold,omitempty"` // members that could not be reached and will learn it from the others
	Note   string   `json:"note,omitempty"`   // what a person should do now
}

// Clusters is GET /v1/clusters.
type Clusters struct {
	Mesh     string    `json:"mesh"`
	Clusters []Cluster `json:"clusters"`
	Alarms   []string  `json:"alarms,omitempty"`
}

// Cluster is one member, this cluster first.
type Cluster struct {
	Name        string   `json:"name"`
	ID          string   `json:"id"`
	Self        bool     `json:"self,omitempty"`
	TrustDomain string   `json:"trustDomain"`
	State       string   `json:"state"` // self, fresh, suspect, withdrawn, joining, left, proposed
	StateAge    float64  `json:"stateAgeSeconds"`
	Lag         *int64   `json:"lag,omitempty"`            // revisions behind; absent when unknown
	SeenAge     *float64 `json:"seenAgeSeconds,omitempty"` // since its last answer
	Revision    int64    `json:"revision"`
	Synced      bool     `json:"synced"`
	Held        string   `json:"held,omitempty"` // why a sweep is held back
	Exports     int      `json:"exports"`
	Endpoints   int      `json:"endpoints"`
	Probe       Probe    `json:"probe"`
	Region      string   `json:"region,omitempty"`
	Network     string   `json:"network"`
	Addresses   []string `json:"addresses"`
	Gateways    []string `json:"gateways,omitempty"`
	Version     string   `json:"version,omitempty"`
	Note        string   `json:"note,omitempty"` // a sentence where a person should know more
}

// Probe is the last end-to-end probe of a member's data path, with SVIDs.
type Probe struct {
	Known bool    `json:"known"`
	OK    bool    `json:"ok"`
	RTT   float64 `json:"rttSeconds,omitempty"`
	Age   float64 `json:"ageSeconds,omitempty"`
	Error string  `json:"error,omitempty"`
}

// Service is one row of GET /v1/services.
type Service struct {
	Namespace  string           `json:"namespace"`
	Name       string           `json:"name"`
	Host       string           `json:"host"`
	Ports      []discovery.Port `json:"ports"`
	Clusters   []ServicePart    `json:"clusters"`
	Exported   bool             `json:"exported"`             // by this cluster
	Unexported int              `json:"unexported,omitempty"` // endpoints of this cluster that are not, since they have no identity
	Conflicts  []string         `json:"conflicts,omitempty"`
}

// ServicePart is one cluster's endpoints of a service.
type ServicePart struct {
	Cluster  string   `json:"cluster"`
	Ready    int      `json:"ready"`
	Total    int      `json:"total"`
	State    string   `json:"state"` // self, fresh, suspect, withdrawn
	Revision int64    `json:"revision,omitempty"`
	Age      *float64 `json:"ageSeconds,omitempty"` // since the data was last confirmed
}

// Endpoint is one row of GET /v1/endpoints?service=ns/name.
type Endpoint struct {
	ID        string  `json:"id"`
	Cluster   string  `json:"cluster"`
	Region    string  `json:"region,omitempty"`
	Zone      string  `json:"zone,omitempty"`
	Address   string  `json:"address"`
	Network   string  `json:"network"`
	Ready     bool    `json:"ready"`
	Draining  bool    `json:"draining,omitempty"`
	State     string  `json:"state"`            // the cluster's: self, fresh, suspect, withdrawn
	Health    string  `json:"health,omitempty"` // worst that any sidecar reports: healthy, ejected, dead; empty is unknown
	SPIFFEID  string  `json:"spiffeID,omitempty"`
	Transport string  `json:"transport"`
	Revision  int64   `json:"revision,omitempty"`
	SeenAge   float64 `json:"seenAgeSeconds,omitempty"`
}

// Status is GET /v1/status.
type Status struct {
	Cluster     string    `json:"cluster"`
	TrustDomain string    `json:"trustDomain"`
	Version     string    `json:"version"`
	OK          bool      `json:"ok"`
	Summary     string    `json:"summary"` // the first line
	Checks      []Check   `json:"checks"`
	Clusters    []Cluster `json:"clusters"`
	Proxies     int       `json:"proxies"`
	Services    int       `json:"services"`
	Replicas    []Replica `json:"replicas,omitempty"` // of the control plane, the leader first; empty if there can be only one
}

// Replica is one hansed of a cluster that has several.
type Replica struct {
	Name         string    `json:"name"`
	ID           string    `json:"id"`
	Leads        bool      `json:"leads"`
	LeadingSince time.Time `json:"leadingSince,omitzero"`
	Self         bool      `json:"self,omitempty"` // it answers
	Addresses    []string  `json:"addresses"`      // of its federation listener
	Version      string    `json:"version,omitempty"`
	Age          float64   `json:"ageSeconds"` // since it started
	Signs        bool      `json:"signs"`      // its own root is acknowledged, and signs
}

// Proxy is one row of GET /v1/proxies.
type Proxy struct {
	ID         string        `json:"id"`
	SPIFFEID   string        `json:"spiffeID"`
	Role       string        `json:"role"`
	Region     string        `json:"region,omitempty"`
	Zone       string        `json:"zone,omitempty"`
	Connected  float64       `json:"connectedSeconds"`
	Version    string        `json:"version,omitempty"`
	State      string        `json:"state"`            // current, behind, nacked
	ConfigAge  float64       `json:"configAgeSeconds"` // since the last acknowledgement
	Resources  []ProxyConfig `json:"resources"`
	TrustAcked bool          `json:"trustAcked"`
}

// ProxyConfig is one resource type on one proxy's stream.
type ProxyConfig struct {
	Type  string `json:"type"` // short: Listener, Cluster, ClusterLoadAssignment, …
	Names int    `json:"names"`
	Sent  string `json:"sent,omitempty"`
	Acked string `json:"acked,omitempty"`
	NACK  string `json:"nack,omitempty"`
}

// ExplainRequest is POST /v1/explain: a call to explain.
type ExplainRequest struct {
	From    string            `json:"from"` // workload: service account or service, "namespace/name"
	To      string            `json:"to"`   // service or authority: "payments", "shop/payments", "payments.shop:8080"
	Path    string            `json:"path,omitempty"`
	Method  string            `json:"method,omitempty"`
	Headers map[string]string `json:"headers,omitempty"`
}

// Explanation is the answer.
type Explanation struct {
	OK      bool           `json:"ok"`
	Summary string         `json:"summary"` // OK or FAILS, and why, in a sentence
	Remedy  string         `json:"remedy,omitempty"`
	From    string         `json:"from"`
	To      string         `json:"to"` // authority
	Name    string         `json:"name"`
	Route   string         `json:"route"`
	Levels  []ExplainLevel `json:"levels"`
	Trust   []string       `json:"trust"`
	Policy  []string       `json:"policy"`
	Config  []string       `json:"config"`
}

// ExplainLevel is one level of endpoints as the caller's sidecar has it.
type ExplainLevel struct {
	Level     int               `json:"level"`
	Cluster   string            `json:"cluster"`
	Region    string            `json:"region,omitempty"`
	Zone      string            `json:"zone,omitempty"`
	Healthy   int               `json:"healthy"`
	Total     int               `json:"total"`
	Share     float64           `json:"share"`          // of traffic, 0 to 1
	Note      string            `json:"note,omitempty"` // "through east's gateways 127.0.2.9:15443 (up)", "suspect for 47s, …"
	Endpoints []ExplainEndpoint `json:"endpoints"`
}

// ExplainEndpoint says why an endpoint stands where it does.
type ExplainEndpoint struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	Health  string `json:"health"`
	Reason  string `json:"reason"`
}

// TrustDomain is one row of GET /v1/trust.
type TrustDomain struct {
	Name        string   `json:"name"`
	Own         bool     `json:"own,omitempty"`
	Member      string   `json:"member,omitempty"` // the cluster whose domain it is
	Sequence    uint64   `json:"sequence"`
	Authorities []string `json:"authorities"` // SHA-256 of each X.509 authority's key, and its expiry, in words
	Source      string   `json:"source"`      // mesh, endpoint, file, applied
	Age         float64  `json:"ageSeconds"`
	Acked       []string `json:"acked,omitempty"`   // members that loaded this sequence (own domain only)
	Missing     []string `json:"missing,omitempty"` // members that have not
	Note        string   `json:"note,omitempty"`
	// Distrusted lists what a person took out of force: the AuthorityID of an authority, or "all".
	Distrusted []string `json:"distrusted,omitempty"`
	// Allow says which of its IDs may serve which services here; empty is all. Withheld counts endpoints that are not imported for it,
	// or for what the Peer's spec.import says.
	Allow    []discovery.Allow `json:"allow,omitempty"`
	Withheld int               `json:"withheld,omitempty"`
	// Refused is the newest bundle that was not taken; the one before it is in force.
	Refused *RefusedBundle `json:"refused,omitempty"`

	Bundle json.RawMessage `json:"bundle,omitempty"` // SPIFFE JSON, when one domain is asked for: GET /v1/trust/NAME
}

// RefusedBundle is a bundle that was not taken.
type RefusedBundle struct {
	Age      float64 `json:"ageSeconds"`
	Source   string  `json:"source"`
	Sequence uint64  `json:"sequence,omitempty"`
	Reason   string  `json:"reason"`
}

// RotateRequest is POST /v1/trust-rotate (streamed).
type RotateRequest struct {
	// ActivateNow does not wait for acknowledgements. Where one is missing it needs Force.
	ActivateNow bool `json:"activateNow,omitempty"`
	Force       bool `json:"force,omitempty"`
}

// Rotation is how far a rotation of this cluster's root has come. It is the payload of the stream, and its end.
type Rotation struct {
	State    string    `json:"state"` // waiting, active
	Root     string    `json:"root"`  // the new one's key, SHA-256
	Old      string    `json:"old,omitempty"`
	Sequence uint64    `json:"sequence"` // of the bundle that announces it
	Elapsed  float64   `json:"elapsedSeconds"`
	Missing  []string  `json:"missing"`         // who has not loaded it
	Deadline time.Time `json:"deadline"`        // when it is activated anyway, with an alarm
	Left     float64   `json:"deadlineSeconds"` // until then
	// OldUntil is when the old root leaves the bundle: when the last SVID that it signed has ended.
	OldUntil *time.Time `json:"oldUntil,omitempty"`
	OldLeft  float64    `json:"oldSeconds,omitempty"`
	Forced   bool       `json:"forced,omitempty"` // activated though not acknowledged by all
	// Away are replicas of hansed that are not there: each replaces its root when it is back.
	Away []string `json:"away,omitempty"`
}

// DistrustRequest is POST /v1/trust-distrust (streamed).
type DistrustRequest struct {
	What  string  `json:"what"` // a trust domain, or an authority: the beginning of its key's SHA-256, key ID or JWT key ID
	Undo  bool    `json:"undo,omitempty"`
	Force bool    `json:"force,omitempty"`       // an own root: also if agents rest on it, which then need new tokens
	Wait  float64 `json:"waitSeconds,omitempty"` // for confirmations; default 30
}

// Distrusted is what came of it. It is the payload of the stream, and its end.
type Distrusted struct {
	TrustDomain string   `json:"trustDomain"`
	Authority   string   `json:"authority,omitempty"` // SHA-256 of the key, or a JWT key ID; empty is all of the domain
	Closed      int      `json:"closed"`              // connections of hansed
	HansedIn    float64  `json:"hansedSeconds"`       // until the last of them was closed
	Confirmed   int      `json:"confirmed"`           // proxies that say that no connection of theirs rests on it any more
	LastIn      float64  `json:"lastSeconds"`         // until the last of them said so
	Missing     []string `json:"missing"`             // who has not confirmed
	Undone      bool     `json:"undone,omitempty"`
	Note        string   `json:"note,omitempty"`
}

// TrustAdd is POST /v1/trust.
type TrustAdd struct {
	TrustDomain string          `json:"trustDomain"`
	Bundle      json.RawMessage `json:"bundle,omitempty"` // SPIFFE JSON
	EndpointURL string          `json:"endpointURL,omitempty"`
	Profile     string          `json:"profile,omitempty"`
	EndpointID  string          `json:"endpointSPIFFEID,omitempty"`
	WebRoots    string          `json:"webRoots,omitempty"` // PEM: who vouches for an https_web endpoint

	Allow []discovery.Allow `json:"allow,omitempty"`
}

// Applied is the answer to POST /v1/apply and DELETE /v1/objects.
type Applied struct {
	Object string `json:"object"` // "HTTPRoute shop/payments"
	Action string `json:"action"` // created, configured, unchanged, deleted
}

// Object is one row of GET /v1/objects.
type Object struct {
	Kind      string          `json:"kind"`
	Namespace string          `json:"namespace,omitempty"`
	Name      string          `json:"name"`
	Source    string          `json:"source"` // applied, or the file it is in
	Status    string          `json:"status,omitempty"`
	Object    json.RawMessage `json:"object"`
}

// DrillSpec is what a drill does. POST /v1/drills/plan answers DrillPlan; POST /v1/drills (streamed) runs it.
type DrillSpec struct {
	Mode      string     `json:"mode"` // drain, blackhole, errors, slow, expire-certificates, distrust-root, silence-control-plane, cut-federation, rotate
	Scope     DrillScope `json:"scope"`
	For       float64    `json:"forSeconds"`        // default 120
	AbortIf   string     `json:"abortIf,omitempty"` // "success<99%"
	Latency   float64    `json:"latencySeconds,omitempty"`
	Status    int        `json:"status,omitempty"`
	Root      string     `json:"root,omitempty"`      // of distrust-root: a trust domain or authority; in a drill "trust domain" or "trust domain/authority"
	KeepAlive bool       `json:"keepAlive,omitempty"` // stop when the client goes away
}

// DrillScope says what is hit. Cluster empty is this cluster; a drill elsewhere is started there, with that cluster's admin identity.
type DrillScope struct {
	Cluster string `json:"cluster,omitempty"`
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Service string `json:"service,omitempty"` // namespace/name
	Share   uint32 `json:"share,omitempty"`   // percent; 0 is 100
}

// DrillPlan says who would take the load.
type DrillPlan struct {
	Spec      DrillSpec      `json:"spec"`
	Summary   string         `json:"summary"`
	Endpoints int            `json:"endpoints"`
	Services  []DrillCovered `json:"services"`
	Covered   bool           `json:"covered"`
	Guard     string         `json:"guard"`
}

// DrillCovered is one service of a plan.
type DrillCovered struct {
	Service string   `json:"service"`
	Hit     int      `json:"hit"`
	Left    int      `json:"left"`
	Takers  []string `json:"takers"` // "west eu-1b (2 healthy)", "east (3 healthy)"
	Covered bool     `json:"covered"`
	Note    string   `json:"note,omitempty"`
}

// Drill is a drill and its report, as far as it has come.
type Drill struct {
	ID        string        `json:"id"`
	Cluster   string        `json:"cluster"` // where it was started
	Spec      DrillSpec     `json:"spec"`
	State     string        `json:"state"`             // running, healing, done, aborted, stopped
	Verdict   string        `json:"verdict,omitempty"` // PASSED or FAILED, once over
	Reason    string        `json:"reason,omitempty"`
	Started   time.Time     `json:"started"`
	Ended     *time.Time    `json:"ended,omitempty"`
	Elapsed   float64       `json:"elapsedSeconds"`
	Detect    *float64      `json:"detectSeconds,omitempty"`  // start to first failure seen by a caller
	Shift     *float64      `json:"shiftSeconds,omitempty"`   // start to the last request served by what is drilled… see docs/drills.md
	Return    *float64      `json:"returnSeconds,omitempty"`  // end to the first request served there again
	Renewed   *float64      `json:"renewedSeconds,omitempty"` // rotate: start until everybody has an SVID of the new root
	Closed    int           `json:"closed,omitempty"`         // rotate, distrust-root: connections of hansed that were closed for their peers
	Calls     uint64        `json:"calls"`
	Failed    uint64        `json:"failed"`
	Retried   uint64        `json:"retried"`
	Success   float64       `json:"success"` // 0 to 1
	P50Before float64       `json:"p50BeforeMs"`
	P50During float64       `json:"p50DuringMs"`
	P99Before float64       `json:"p99BeforeMs"`
	P99During float64       `json:"p99DuringMs"`
	Traffic   []DrillShare  `json:"traffic"` // where it went
	Timeline  []DrillMoment `json:"timeline"`
	Executors []string      `json:"executors"`
	Missing   []string      `json:"missing,omitempty"` // executors or callers that did not report
}

// DrillShare is the share of one destination, before, during and after.
type DrillShare struct {
	Service string  `json:"service"`
	Cluster string  `json:"cluster"`
	Zone    string  `json:"zone,omitempty"`
	Before  float64 `json:"before"`
	During  float64 `json:"during"`
	After   float64 `json:"after"`
}

// DrillMoment is one event.
type DrillMoment struct {
	At     float64 `json:"atSeconds"` // since the start
	Kind   string  `json:"kind"`      // started, first_failure, shifted, healed, returned, aborted
	Detail string  `json:"detail"`
}
