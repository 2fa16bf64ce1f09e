package proxy

import (
	"net/netip"
	"regexp"
	"time"
)

// Table is everything that a proxy obeys. What a sidecar has not asked for is not in it.
type Table struct {
	Version   uint64               // grows with every Table of one process
	Listeners map[string]*Listener // by authority, "payments.shop.svc.clusterset.local:8080"
	Unknown   map[string]time.Time // authorities that the control plane said do not exist, and when
	Clusters  map[string]*Cluster  // by authority; what Listeners refer to
	Inbound   *Inbound             // nil until received
	SNI       map[string][]Target  // gateway only: sealed bytes go where the SNI says
	Trust     map[string]uint64    // newest bundle sequence by trust domain
	Faults    []Fault
}

// Listener is one outbound service port as callers name it.
type Listener struct {
	Authority string
	Protocol  Protocol
	Routes    []*Route // HTTP; first match wins (the control plane has ordered them by precedence)
	Cluster   string   // TCP: the authority of the backend; several are weighted in Split
	Split     []Backend
	SNI       []SNIRoute // TCP: connections that begin with TLS to one of these names; first match wins, before Cluster and Split
}

// SNIRoute is for connections whose client names a server.
type SNIRoute struct {
	Name  string   // "TLSRoute shop/payments rule 1"
	Hosts []string // lower case; "*.example.com" is every name below it
	Split []Backend
}

// Protocol is what the application speaks.
type Protocol string

// Protocols.
const (
	HTTP  Protocol = "http"
	HTTP2 Protocol = "http2"
	GRPC  Protocol = "grpc"
	TCP   Protocol = "tcp"
)

// Route is one match and what follows.
type Route struct {
	Name           string // "HTTPRoute shop/payments rule 2", for logs, metrics and explain
	Match          Match
	Request        HeaderEdits
	Response       HeaderEdits
	Redirect       *Redirect
	DirectStatus   int // answer at once with this status, e.g. 500 where a rule has no valid backend
	Rewrite        Rewrite
	Backends       []Backend
	Mirror         *Backend      // Weight is the percentage of requests to copy
	RequestTimeout time.Duration // 0: none
	TryTimeout     time.Duration // 0: none
	Retry          Retry
}

// Match holds if all parts hold. The zero Match is every request. Regular expressions are made by CompileWhole.
type Match struct {
	PathExact  string
	PathPrefix string // by path element
	PathRegex  *regexp.Regexp
	Method     string
	Headers    []ValueMatch
	Query      []ValueMatch
}

// ValueMatch is on one header or query parameter.
type ValueMatch struct {
	Name  string // headers: canonical lower case
	Exact string
	Regex *regexp.Regexp // nil: Exact
}

// HeaderEdits are applied in the order Set, Add, Remove.
type HeaderEdits struct {
	Set, Add []Header
	Remove   []string
}

// Header is one field.
type Header struct{ Name, Value string }

// Redirect answers at the caller's side.
type Redirect struct {
	Scheme, Host  string
	Port          uint16
	Status        int
	ReplacePath   *string
	ReplacePrefix *string
}

// Rewrite changes what the backend sees. Zero fields change nothing.
type Rewrite struct {
	Host          string
	ReplacePath   *string
	ReplacePrefix *string
}

// Backend is a weighted cluster.
type Backend struct {
	Cluster      string // authority
	Weight       uint32
	Request      HeaderEdits
	Response     HeaderEdits
	Rewrite      Rewrite
	DirectStatus int // this share is answered with the status (an invalid backendRef: 500)
}

// Retry says which failures are tried again, on another endpoint. Connection failures and refused streams, where nothing
// reached the application, are always retryable.
type Retry struct {
	Attempts int // beyond the first
	Codes    []int
	GRPC     []int
	Backoff  time.Duration
}

// Cluster is one service port's endpoints, in levels.
type Cluster struct {
	Name              string // authority
	Service           string // "shop/payments"
	Protocol          Protocol
	ConnectTimeout    time.Duration // 0: 1 s
	Policy            string        // "least_request", "round_robin", "ring_hash"
	HashHeader        string
	MaxRequests       uint32 // 0: 1024
	RetryBudget       Budget
	Outlier           Outlier
	Overprovisioning  uint32 // percent; Envoy's default 140
	PanicThreshold    uint32 // percent of all levels together; Envoy's default 50
	Levels            []Level
	WeightedLocality  bool // levels hold localities with weights (TrafficPolicy Weigh)
	EndpointsReceived bool // false until a ClusterLoadAssignment came
}

// Budget bounds retries by active requests.
type Budget struct {
	Percent        uint32 // default 20
	MinConcurrency uint32 // default 3
}

// Outlier is passive health (Envoy's words and defaults).
type Outlier struct {
	ConsecutiveErrors uint32
	Interval          time.Duration
	BaseEjection      time.Duration
	MaxEjection       time.Duration
	MaxPercent        uint32
}

// Level is one priority.
type Level struct {
	Localities []LocalityEndpoints
}

// LocalityEndpoints are the endpoints of one locality within a level.
type LocalityEndpoints struct {
	Locality  Locality
	Weight    uint32
	Endpoints []*Endpoint
}

// Locality says where something runs.
type Locality struct{ Cluster, Region, Zone string }

// Endpoint is one workload. The key of its health is ID together with the xDS cluster.
type Endpoint struct {
	ID        string
	Address   netip.AddrPort   // the hop port, or for TransportTLS the workload's own mTLS port
	Gateways  []netip.AddrPort // not empty: dial one of these, with SNI; Address is not reachable from here
	SNI       string           // "<id>.endpoint.hanse"
	SPIFFEID  string           // the only ID accepted
	Transport Transport
	Locality  Locality
	Weight    uint32
	Suspect   bool // its cluster's control plane is silent
	Draining  bool
	Unhealthy bool   // the control plane says not to use it
	Reason    string // why it has this level, for explain
}

// Transport is how an endpoint is reached.
type Transport string

// Transports.
const (
	TransportHop       Transport = "hop"
	TransportTLS       Transport = "tls"
	TransportPlaintext Transport = "plaintext"
)

// Target is where a gateway sends sealed bytes.
type Target struct {
	ID      string
	Address netip.AddrPort
	Weight  uint32
}

// Inbound is what a sidecar serves: the declared ports of its workload and who may call them.
type Inbound struct {
	Address netip.Addr
	Ports   []InboundPort
}

// InboundPort is one declared port.
type InboundPort struct {
	Services []string // authorities that lead here, "payments.shop.svc.clusterset.local:8080"
	Port     uint16   // the workload's target port
	Protocol Protocol
	Access   Access
}

// Access is the authorisation of one port. Decide with Access.Check.
type Access struct {
	TrustDomain  string // own
	DefaultAllow bool   // callers of the own trust domain, where no policy selects the service
	Deny         []AccessRule
	Allow        []AccessRule
	AuditDeny    []AccessRule // logged and counted only
	AuditAllow   []AccessRule
}

// AccessRule matches if one of each non-empty list matches.
type AccessRule struct {
	Policy  string // "AccessPolicy shop/payments"
	From    []string
	Foreign bool // the rule may match callers of other trust domains (the service is exported)
	Methods []string
	Paths   []string // exact, or a prefix that ends in "*"
}

// Fault is a drill's order to this proxy. It acts below the hop engine.
type Fault struct {
	Drill   string
	Mode    FaultMode
	Share   uint32        // percent of connections or requests, 1 to 100
	Latency time.Duration // Slow
	Status  int           // Errors
	Root    string        // DistrustRoot: a trust domain, or trust domain/authority
	Ports   []uint16      // the workload's target ports; empty is all
	End     time.Duration // from receipt: heal by itself then
	Lease   time.Duration // from receipt: heal unless renewed (the same drill with another Renewal); 0: none
	Renewal uint64        // grows with each sending
	Report  time.Duration // interval of load reports while the drill runs

	Received time.Time // of this sending, by the monotonic clock
}

// Active reports whether the fault is to be obeyed at now: neither over, nor without renewal for its lease.
func (f *Fault) Active(now time.Time) bool {
	age := now.Sub(f.Received)
	return age < f.End && (f.Lease == 0 || age < f.Lease)
}

// FaultMode says what a fault does.
type FaultMode string

// Modes. Drain finishes open streams, refuses new ones as retryable, and ends connections.
const (
	FaultDrain     FaultMode = "drain"
	FaultBlackhole FaultMode = "blackhole"
	FaultSlow      FaultMode = "slow"
	FaultErrors    FaultMode = "errors"
	FaultExpire    FaultMode = "expire-certificates" // handshakes present an SVID that has expired
	FaultDistrust  FaultMode = "distrust-root"       // handshakes refuse, and open connections end, that rest on Root
	FaultObserve   FaultMode = "observe"             // no fault: report load at Report, as a caller of what is being drilled
)
