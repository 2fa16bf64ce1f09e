package discovery

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Route is an HTTPRoute, GRPCRoute, TLSRoute or TCPRoute whose parent is a Service (GAMMA, GEP-1294).
type Route struct {
	Name
	Kind    string       `json:"kind"`
	Created time.Time    `json:"created"`
	Parents []RouteRef   `json:"parents"`
	SNI     []string     `json:"sni,omitempty"` // TLSRoute: lower-case host names, of which one may begin with "*."
	Rules   []*RouteRule `json:"rules"`
}

// RouteRef names a Service and, where Port is not 0, one port of it.
type RouteRef struct {
	Service Name   `json:"service"`
	Port    uint16 `json:"port,omitempty"`
	Import  bool   `json:"import,omitempty"` // a ServiceImport: callers of the clusterset's name or IP only (GEP-1748)
}

// RouteRule is one rule: it applies if any match does; no matches is every request.
type RouteRule struct {
	Name           string        `json:"name,omitempty"`
	Matches        []RouteMatch  `json:"matches,omitempty"`
	Filters        Filters       `json:"filters,omitzero"`
	Backends       []Backend     `json:"backends"` // none, and no redirect: 500 (Gateway API HTTPRouteRule.backendRefs)
	RequestTimeout time.Duration `json:"requestTimeout,omitempty"`
	BackendTimeout time.Duration `json:"backendTimeout,omitempty"` // of each try
	Retry          *Retry        `json:"retry,omitempty"`
}

// RouteMatch holds if all of its parts hold. Precedence between matches is the Gateway API's.
type RouteMatch struct {
	Path    *PathMatch   `json:"path,omitempty"`
	Method  string       `json:"method,omitempty"`
	Headers []ValueMatch `json:"headers,omitempty"`
	Query   []ValueMatch `json:"query,omitempty"`
}

// PathMatch is on the path without query. A GRPCRoute's service and method become an exact or prefix path.
type PathMatch struct {
	Type  MatchType `json:"type"`
	Value string    `json:"value"`
}

// MatchType says how a value is compared.
type MatchType string

// Match types. Prefix is by path element: "/a" matches "/a" and "/a/b", not "/ab".
const (
	MatchExact  MatchType = "Exact"
	MatchPrefix MatchType = "PathPrefix"
	MatchRegex  MatchType = "RegularExpression" // RE2, whole value
)

// ValueMatch is on one header (name case-insensitive) or one query parameter.
type ValueMatch struct {
	Type  MatchType `json:"type"`
	Name  string    `json:"name"`
	Value string    `json:"value"`
}

// Filters are what a rule or a backend does to a request and its response.
type Filters struct {
	Request  HeaderEdits `json:"request,omitzero"`
	Response HeaderEdits `json:"response,omitzero"`
	Redirect *Redirect   `json:"redirect,omitempty"`
	Rewrite  *Rewrite    `json:"rewrite,omitempty"`
	Mirror   *Backend    `json:"mirror,omitempty"`

	MirrorPercent float64 `json:"mirrorPercent,omitempty"` // of requests; 0 is all of them
}

// HeaderEdits are applied in the order Set, Add, Remove.
type HeaderEdits struct {
	Set    []Header `json:"set,omitempty"`
	Add    []Header `json:"add,omitempty"`
	Remove []string `json:"remove,omitempty"`
}

// Header is one header field.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Redirect answers at the caller's side. Empty fields keep what the request had.
type Redirect struct {
	Scheme        string  `json:"scheme,omitempty"`
	Host          string  `json:"host,omitempty"`
	Port          uint16  `json:"port,omitempty"`
	Status        int     `json:"status"` // 301, 302, 303, 307 or 308
	ReplacePath   *string `json:"replacePath,omitempty"`
	ReplacePrefix *string `json:"replacePrefix,omitempty"`
}

// Rewrite changes what the backend sees.
type Rewrite struct {
	Host          string  `json:"host,omitempty"`
	ReplacePath   *string `json:"replacePath,omitempty"`
	ReplacePrefix *string `json:"replacePrefix,omitempty"`
}

// Backend is a weighted Service port.
type Backend struct {
	Service Name    `json:"service"`
	Port    uint16  `json:"port"`
	Weight  uint32  `json:"weight"`
	Filters Filters `json:"filters,omitzero"`
	Import  bool    `json:"import,omitempty"`  // a ServiceImport: the whole clusterset's, whoever calls (GEP-1748)
	Invalid string  `json:"invalid,omitempty"` // why the reference does not resolve; its share of requests gets 500
}

// Retry says which failures are tried again, elsewhere.
type Retry struct {
	Attempts int           `json:"attempts"` // beyond the first try
	Codes    []int         `json:"codes,omitempty"`
	Backoff  time.Duration `json:"backoff,omitempty"`
}

// TrafficPolicy is the caller's: how this cluster's workloads call a service. It is never exported.
type TrafficPolicy struct {
	Name
	Service      Name              `json:"service"`
	Mode         LocalityMode      `json:"mode"`
	Order        []LocalityMatch   `json:"order,omitempty"`   // Pin and Failover: the levels, first preferred
	Weights      []LocalityWeight  `json:"weights,omitempty"` // Weigh
	Outlier      *OutlierDetection `json:"outlierDetection,omitempty"`
	RetryBudget  *RetryBudget      `json:"retryBudget,omitempty"`
	Timeout      time.Duration     `json:"timeout,omitempty"`
	ConnTimeout  time.Duration     `json:"connectTimeout,omitempty"`
	LoadBalancer string            `json:"loadBalancer,omitempty"` // LeastRequest (default), RoundRobin, RingHash
	HashHeader   string            `json:"hashHeader,omitempty"`
	MaxRequests  uint32            `json:"maxRequests,omitempty"` // concurrent, per proxy; 0 is 1024
}

// LocalityMode says how levels are made.
type LocalityMode string

// Modes. The default order is same zone, same region, same cluster, then other clusters by region match.
const (
	ModeFailover LocalityMode = "Failover" // levels; Order first, then the default order
	ModePin      LocalityMode = "Pin"      // only what Order names
	ModeBalance  LocalityMode = "Balance"  // all fresh endpoints at one level
	ModeWeigh    LocalityMode = "Weigh"    // Weights between localities
)

// LocalityMatch matches a locality; empty fields match all. "$self" stands for the caller's own value.
type LocalityMatch struct {
	Cluster string `json:"cluster,omitempty"`
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
}

// LocalityWeight is a share of traffic.
type LocalityWeight struct {
	LocalityMatch
	Weight uint32 `json:"weight"`
}

// OutlierDetection ejects endpoints by what the data path sees (Envoy's words).
type OutlierDetection struct {
	ConsecutiveErrors uint32        `json:"consecutiveErrors,omitempty"` // 0 is 5; connection failures and 502, 503, 504
	Interval          time.Duration `json:"interval,omitempty"`
	BaseEjection      time.Duration `json:"baseEjection,omitempty"`
	MaxEjection       time.Duration `json:"maxEjection,omitempty"`
	MaxPercent        uint32        `json:"maxPercent,omitempty"`
}

// RetryBudget bounds retries by active requests.
type RetryBudget struct {
	Percent        uint32 `json:"percent"`        // of active requests; default 20
	MinConcurrency uint32 `json:"minConcurrency"` // default 3
}

// AccessPolicy is the server's: who may call the workloads behind a service. Foreign trust domains are denied unless the
// service is exported and a rule of an AccessPolicy names the caller; callers of the own trust domain are allowed
// until the first policy selects the service.
type AccessPolicy struct {
	Name
	Services []Name       `json:"services,omitempty"` // in the policy's namespace; empty is all of them
	Deny     bool         `json:"deny,omitempty"`     // a matching rule refuses; deny rules are read first
	Audit    bool         `json:"audit,omitempty"`    // only counted and logged, never enforced
	Rules    []AccessRule `json:"rules"`
}

// AccessRule matches if one of each non-empty list matches.
type AccessRule struct {
	From    []string `json:"from,omitempty"`    // SPIFFE-ID patterns (identity.MatchPattern)
	Methods []string `json:"methods,omitempty"` // HTTP only
	Paths   []string `json:"paths,omitempty"`   // HTTP only; exact, or a prefix that ends in "*"
	Ports   []uint16 `json:"ports,omitempty"`   // service ports
}

// Peer is what this cluster lets another member do.
type Peer struct {
	Name          string            `json:"name"`                    // member name
	Introductions string            `json:"introductions,omitempty"` // accept (default), ask or refuse: members that it introduces
	Namespaces    []string          `json:"namespaces,omitempty"`    // importable; empty is all
	SPIFFEIDs     []string          `json:"spiffeIDs,omitempty"`     // patterns that its endpoints' IDs must match; empty is its trust domain
	Disabled      bool              `json:"disabled,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
}

// FederatedTrustDomain is a ClusterFederatedTrustDomain (SPIRE's CRD).
type FederatedTrustDomain struct {
	Name        string `json:"name"`
	TrustDomain string `json:"trustDomain"`
	EndpointURL string `json:"bundleEndpointURL,omitempty"`
	Profile     string `json:"bundleEndpointProfile,omitempty"` // https_spiffe or https_web
	EndpointID  string `json:"endpointSPIFFEID,omitempty"`
	WebRoots    string `json:"webRoots,omitempty"`          // PEM: who vouches for an https_web endpoint; empty: the control plane's
	Bundle      string `json:"trustDomainBundle,omitempty"` // SPIFFE JSON

	Allow []Allow `json:"allow,omitempty"` // what may be imported of it; empty is everything
}

// Allow says which IDs of a foreign trust domain may serve which services.
type Allow struct {
	Services  []string `json:"services,omitempty"` // namespace/name, "*" for any of either; empty is all
	SPIFFEIDs []string `json:"spiffeIDs"`          // patterns (identity.MatchPattern)
}

// Allowed says whether a foreign ID may serve a service. matches tells whether the ID matches a pattern. Without rules it may.
func Allowed(rules []Allow, service Name, matches func(pattern string) bool) bool {
	return len(rules) == 0 || slices.ContainsFunc(rules, func(a Allow) bool {
		return (len(a.Services) == 0 || slices.ContainsFunc(a.Services, service.MatchPattern)) && slices.ContainsFunc(a.SPIFFEIDs, matches)
	})
}

// MatchPattern says whether a name matches namespace/name, in which "*" stands for any of either.
func (n Name) MatchPattern(pattern string) bool {
	namespace, name, ok := strings.Cut(pattern, "/")
	return ok && (namespace == "*" || namespace == n.Namespace) && (name == "*" || name == n.Name)
}

// AllowOf returns the rules of a trust domain; nil lets everything in.
func (s *Snapshot) AllowOf(trustDomain string) []Allow {
	for _, t := range s.TrustDomains {
		if t.TrustDomain == trustDomain {
			return t.Allow
		}
	}
	return nil
}

// Self says which cluster a Snapshot describes.
type Self struct {
	Cluster     string           `json:"cluster"`
	TrustDomain string           `json:"trustDomain"`
	Network     string           `json:"network"`
	Region      string           `json:"region,omitempty"`
	Gateways    []netip.AddrPort `json:"gateways,omitempty"`
}

// Snapshot is everything one cluster's sources say.
type Snapshot struct {
	Self          Self                    `json:"self"`
	Complete      bool                    `json:"complete"` // every source has been read whole at least once
	Services      ByName[*Service]        `json:"-"`
	Routes        []*Route                `json:"routes,omitempty"`
	TrafficPolicy map[Name]*TrafficPolicy `json:"-"` // by service
	Access        []*AccessPolicy         `json:"accessPolicies,omitempty"`
	Peers         map[string]*Peer        `json:"peers,omitempty"`
	TrustDomains  []*FederatedTrustDomain `json:"trustDomains,omitempty"`
	Accounts      []Name                  `json:"accounts,omitempty"`      // service accounts of workloads with a sidecar, sorted, where they are known though no service leads to them (Pods)
	ClustersetIPs map[netip.Addr]Name     `json:"clustersetIPs,omitempty"` // by which callers in this cluster know services of the clusterset (ServiceImport.spec.ips)
}
