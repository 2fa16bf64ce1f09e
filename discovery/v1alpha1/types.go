package v1alpha1

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// APIVersion of the kinds of this mesh.
const APIVersion = "hanse.mesh/v1alpha1"

// SPIREAPIVersion of ClusterFederatedTrustDomain.
const SPIREAPIVersion = "spire.spiffe.io/v1alpha1"

// Peer says what this cluster accepts from another member of the mesh. It is cluster-scoped; metadata.name is the
// member's name, and metadata.labels are what a ServiceExport's audience can select.
//
// +kubebuilder:resource:scope=Cluster,categories=hanse
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name=Introductions,type=string,JSONPath=`.spec.introductions`
// +kubebuilder:printcolumn:name=Disabled,type=boolean,JSONPath=`.spec.disabled`
// +kubebuilder:printcolumn:name=Accepted,type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')",message="metadata.name is a member's name: a DNS label"
type Peer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	Spec PeerSpec `json:"spec,omitempty"`
	// Status is what became of it.
	//
	// +optional
	Status Status `json:"status,omitzero"`
}

// Status is what became of an object; hansed writes it.
type Status struct {
	// Conditions: Accepted says whether the object is in force as it is now, or why not.
	//
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// The condition of our own kinds and its reasons (GEP-713).
const (
	ConditionAccepted = "Accepted"
	ReasonAccepted    = "Accepted"
	ReasonInvalid     = "Invalid"
	ReasonPending     = "Pending" // it is right, and waits for another object
)

// Values of PeerSpec.Introductions.
const (
	IntroductionsAccept = "accept"
	IntroductionsAsk    = "ask"
	IntroductionsRefuse = "refuse"
)

// PeerSpec is the desired relation to a member.
type PeerSpec struct {
	// Introductions says what happens with members that this peer introduces: accept (default), ask or refuse.
	//
	// +kubebuilder:validation:Enum="";accept;ask;refuse
	Introductions string `json:"introductions,omitempty"`
	// Import bounds what is taken from this peer. The default is everything of its own trust domain.
	Import PeerImport `json:"import,omitempty"`
	// Disabled stops importing from this peer and refuses its calls, without forgetting it.
	Disabled bool `json:"disabled,omitempty"`
}

// PeerImport bounds an import.
type PeerImport struct {
	// Namespaces whose services are imported; empty is all.
	//
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Namespaces []string `json:"namespaces,omitempty"`
	// SPIFFEIDs are patterns of which one must match the ID of an imported endpoint; empty is the peer's trust domain.
	//
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MaxLength=2048
	// +kubebuilder:validation:items:Pattern=`^spiffe://.+`
	SPIFFEIDs []string `json:"spiffeIDs,omitempty"`
}

// TrafficPolicy is the caller's: how the workloads of this cluster call the services it targets. It is never exported.
//
// +kubebuilder:resource:shortName=tp,categories=hanse
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name=Mode,type=string,JSONPath=`.spec.locality.mode`
// +kubebuilder:printcolumn:name=Services,type=string,JSONPath=`.spec.targetRefs[*].name`
// +kubebuilder:printcolumn:name=Accepted,type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
type TrafficPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	Spec TrafficPolicySpec `json:"spec"`
	// Status is what became of it.
	//
	// +optional
	Status Status `json:"status,omitzero"`
}

// TargetRef names a Service in the policy's own namespace (GEP-713, direct policy attachment).
//
// +kubebuilder:validation:XValidation:rule="self.kind == 'Service' ? !has(self.group) || size(self.group) == 0 : has(self.group) && self.group == 'multicluster.x-k8s.io'",message="group is empty for a Service, and multicluster.x-k8s.io for a ServiceImport"
type TargetRef struct {
	// Group is empty for a Service, and multicluster.x-k8s.io for a ServiceImport.
	Group string `json:"group,omitempty"`
	// Kind is Service or ServiceImport.
	//
	// +kubebuilder:validation:Enum=Service;ServiceImport
	Kind string `json:"kind"`
	// Name of the Service.
	//
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Name string `json:"name"`
}

// TrafficPolicySpec is the desired behaviour of callers.
type TrafficPolicySpec struct {
	// TargetRefs are the services called. They may live in this cluster, in others, or both.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=100
	TargetRefs []TargetRef `json:"targetRefs"`
	// Locality says which places are preferred. The default is the nearest: same zone, same region, same cluster, then others.
	Locality Locality `json:"locality,omitempty"`
	// LoadBalancer says how an endpoint of a level is picked.
	LoadBalancer LoadBalancer `json:"loadBalancer,omitempty"`
	// OutlierDetection ejects endpoints that fail, for a while.
	OutlierDetection *OutlierDetection `json:"outlierDetection,omitempty"`
	// RetryBudget bounds the retries that are active at one time.
	RetryBudget *RetryBudget `json:"retryBudget,omitempty"`
	// Timeouts of a call. A route's timeouts win over request.
	Timeouts Timeouts `json:"timeouts,omitempty"`
	// MaxRequests bounds the concurrent requests of one proxy to one service; default 1024.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	MaxRequests *int32 `json:"maxRequests,omitempty"`
}

// Locality says which places are preferred.
//
// +kubebuilder:validation:XValidation:rule="!has(self.mode) || self.mode != 'Pin' || has(self.order) && size(self.order) > 0",message="mode Pin needs order: where to pin the traffic to"
// +kubebuilder:validation:XValidation:rule="!has(self.order) || size(self.order) == 0 || !has(self.mode) || size(self.mode) == 0 || self.mode in ['Failover', 'Pin']",message="order has a meaning in the modes Failover and Pin only"
// +kubebuilder:validation:XValidation:rule="(has(self.weights) && size(self.weights) > 0) == (has(self.mode) && self.mode == 'Weigh')",message="weights go with mode Weigh, and mode Weigh with weights"
// +kubebuilder:validation:XValidation:rule="!has(self.weights) || size(self.weights) == 0 || self.weights.exists(w, w.weight > 0)",message="weights are all zero, which would send the traffic nowhere"
type Locality struct {
	// Mode is Failover (default), Pin, Balance or Weigh.
	//
	// +kubebuilder:validation:Enum="";Failover;Pin;Balance;Weigh
	Mode string `json:"mode,omitempty"`
	// Order is the levels, first preferred; for Failover (the default order follows) and Pin (nothing follows).
	//
	// +kubebuilder:validation:MaxItems=64
	Order []LocalityMatch `json:"order,omitempty"`
	// Weights are shares of the traffic, for Weigh.
	//
	// +kubebuilder:validation:MaxItems=64
	Weights []LocalityWeight `json:"weights,omitempty"`
}

// LocalityMatch matches a place. An empty field matches all; "$self" is the caller's own value.
type LocalityMatch struct {
	// Cluster is a member's name, or "$self".
	//
	// +kubebuilder:validation:MaxLength=63
	Cluster string `json:"cluster,omitempty"`
	// Region of the endpoints, or "$self".
	//
	// +kubebuilder:validation:MaxLength=63
	Region string `json:"region,omitempty"`
	// Zone of the endpoints, or "$self".
	//
	// +kubebuilder:validation:MaxLength=63
	Zone string `json:"zone,omitempty"`
}

// LocalityWeight is a share of traffic: its weight over the sum of all weights.
type LocalityWeight struct {
	LocalityMatch `json:",inline"`
	// Weight of this place.
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000
	Weight int32 `json:"weight"`
}

// LoadBalancer says how an endpoint of a level is picked.
//
// +kubebuilder:validation:XValidation:rule="(has(self.hashHeader) && size(self.hashHeader) > 0) == (has(self.type) && self.type == 'RingHash')",message="hashHeader goes with type RingHash, and type RingHash with hashHeader"
type LoadBalancer struct {
	// Type is LeastRequest (default), RoundRobin or RingHash.
	//
	// +kubebuilder:validation:Enum="";LeastRequest;RoundRobin;RingHash
	Type string `json:"type,omitempty"`
	// HashHeader is the request header that RingHash hashes.
	HashHeader string `json:"hashHeader,omitempty"`
}

// OutlierDetection ejects endpoints that fail, for a while.
type OutlierDetection struct {
	// ConsecutiveErrors after which an endpoint is ejected; default 5. Errors are failed connections and 502, 503 and 504.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	ConsecutiveErrors *int32 `json:"consecutiveErrors,omitempty"`
	// Interval between checks.
	Interval *gatewayv1.Duration `json:"interval,omitempty"`
	// BaseEjectionTime is the time of the first ejection; it grows with each.
	BaseEjectionTime *gatewayv1.Duration `json:"baseEjectionTime,omitempty"`
	// MaxEjectionTime is the longest; at least baseEjectionTime.
	MaxEjectionTime *gatewayv1.Duration `json:"maxEjectionTime,omitempty"`
	// MaxEjectionPercent of a level that is ejected at a time.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	MaxEjectionPercent *int32 `json:"maxEjectionPercent,omitempty"`
}

// RetryBudget bounds the retries that are active at one time.
type RetryBudget struct {
	// Percent of the active requests; default 20.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	Percent *int32 `json:"percent,omitempty"`
	// MinConcurrency is always allowed; default 3.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000
	MinConcurrency *int32 `json:"minConcurrency,omitempty"`
}

// Timeouts of a call. A route's timeouts win over Request.
type Timeouts struct {
	// Request is the time for the whole call; 0s is none.
	Request *gatewayv1.Duration `json:"request,omitempty"`
	// Connect is the time for a connection to one endpoint.
	Connect *gatewayv1.Duration `json:"connect,omitempty"`
}

// AccessPolicy is the server's: who may call the targeted services of this cluster.
//
// +kubebuilder:resource:shortName=ap,categories=hanse
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name=Action,type=string,JSONPath=`.spec.action`
// +kubebuilder:printcolumn:name=Mode,type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name=Services,type=string,JSONPath=`.spec.targetRefs[*].name`
// +kubebuilder:printcolumn:name=Accepted,type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
type AccessPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	Spec AccessPolicySpec `json:"spec"`
	// Status is what became of it.
	//
	// +optional
	Status Status `json:"status,omitzero"`
}

// Values of AccessPolicySpec.Action and Mode.
const (
	ActionAllow = "Allow"
	ActionDeny  = "Deny"
	ModeEnforce = "Enforce"
	ModeAudit   = "Audit"
)

// AccessPolicySpec is the desired access.
//
// +kubebuilder:validation:XValidation:rule="!has(self.action) || self.action != 'Deny' || has(self.rules) && size(self.rules) > 0",message="without rules a Deny policy denies nobody; to deny everybody, use one empty rule: [{}]"
type AccessPolicySpec struct {
	// TargetRefs are Services in the policy's namespace; empty is every Service of the namespace.
	//
	// +kubebuilder:validation:MaxItems=100
	TargetRefs []TargetRef `json:"targetRefs,omitempty"`
	// Action is Allow (default) or Deny. Deny policies are read first.
	//
	// +kubebuilder:validation:Enum="";Allow;Deny
	Action string `json:"action,omitempty"`
	// Mode is Enforce (default) or Audit: count and log what would be refused, and let it through.
	//
	// +kubebuilder:validation:Enum="";Enforce;Audit
	Mode string `json:"mode,omitempty"`
	// Rules, of which one must match. An Allow policy without rules allows nobody.
	//
	// +kubebuilder:validation:MaxItems=1000
	Rules []AccessRule `json:"rules,omitempty"`
}

// AccessRule matches a request if one entry of each list that is not empty does.
type AccessRule struct {
	// From are SPIFFE-ID patterns; "*" stands for one whole segment or the trust domain, a last "**" for any rest.
	//
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MaxLength=2048
	// +kubebuilder:validation:items:Pattern=`^spiffe://.+`
	From []string `json:"from,omitempty"`
	// Methods are HTTP methods.
	//
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=32
	// +kubebuilder:validation:items:Pattern=`^[A-Z]([A-Z_-]{0,30}[A-Z])?$`
	Methods []string `json:"methods,omitempty"`
	// Paths are exact, or a prefix that ends in "*".
	//
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MaxLength=4096
	// +kubebuilder:validation:items:Pattern=`^(/[^*]*\*?|\*)$`
	Paths []string `json:"paths,omitempty"`
	// Ports are port numbers of the service.
	//
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports,omitempty"`
}

// Drill is a failure on purpose, in a file: hanse drill run -f starts it, once. It is no configuration: nothing begins to fail because an
// object exists, or does so again because something restarts.
type Drill struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec DrillSpec `json:"spec"`
}

// Modes of a Drill.
const (
	DrillDrain               = "drain"
	DrillBlackhole           = "blackhole"
	DrillSlow                = "slow"
	DrillErrors              = "errors"
	DrillSilenceControlPlane = "silence-control-plane"
	DrillCutFederation       = "cut-federation"
	DrillExpireCertificates  = "expire-certificates"
	DrillDistrustRoot        = "distrust-root"
	DrillRotate              = "rotate"
)

// How long a Drill may last.
const (
	MinDrill = time.Second
	MaxDrill = time.Hour
)

// DrillModes lists them.
func DrillModes() []string {
	return []string{DrillDrain, DrillBlackhole, DrillErrors, DrillSlow, DrillExpireCertificates, DrillDistrustRoot, DrillSilenceControlPlane, DrillCutFederation, DrillRotate}
}

// DrillSpec is what fails, where and for how long.
type DrillSpec struct {
	Mode  string     `json:"mode"`
	Scope DrillScope `json:"scope"`
	// Duration after which the drill ends by itself; default 2m, from 1s to 1h.
	Duration *gatewayv1.Duration `json:"duration,omitempty"`
	// AbortIf ends the drill early, as "success<99%": the success of any caller over 10 s. The default is success<99%.
	AbortIf string `json:"abortIf,omitempty"`
	// Latency is added to each request by mode slow, which needs it.
	Latency *gatewayv1.Duration `json:"latency,omitempty"`
	// ErrorCode is the HTTP status that mode errors answers with; default 503.
	ErrorCode *int32 `json:"errorCode,omitempty"`
	// Root is whom mode distrust-root does not trust, which needs it: a trust domain, or the beginning of an authority's name.
	Root string `json:"root,omitempty"`
}

// DrillScope narrows a drill. Fields that are set must all hold.
type DrillScope struct {
	Cluster string `json:"cluster"`
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	// Service is "namespace/name"; empty is all.
	Service string `json:"service,omitempty"`
	// Percent of the endpoints (drain, blackhole) or requests (slow, errors); default 100.
	Percent *int32 `json:"percent,omitempty"`
}

// MinSuccess reads AbortIf: the success rate in percent below which the drill ends.
func (s *DrillSpec) MinSuccess() (percent float64, err error) {
	if s.AbortIf == "" {
		return 99, nil
	}
	compact := strings.ReplaceAll(s.AbortIf, " ", "")
	number, ok := strings.CutPrefix(compact, "success<")
	number, percentSign := strings.CutSuffix(number, "%")
	percent, err = strconv.ParseFloat(number, 64)
	if !ok || !percentSign || err != nil || !(percent >= 0 && percent <= 100) {
		return 0, fmt.Errorf("abort condition %q: must be success<N%% with N from 0 to 100", s.AbortIf)
	}
	return percent, nil
}

// ClusterFederatedTrustDomain is SPIRE's kind of the same name: a bundle federation with another trust domain. Where SPIRE's own
// definition is installed, that one holds; it has no spec.allow, for which the annotation hanse.mesh/allow stands.
//
// +kubebuilder:resource:scope=Cluster,categories=hanse
// +kubebuilder:printcolumn:name=Trust Domain,type=string,JSONPath=`.spec.trustDomain`
// +kubebuilder:printcolumn:name=Endpoint URL,type=string,JSONPath=`.spec.bundleEndpointURL`
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
type ClusterFederatedTrustDomain struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	Spec ClusterFederatedTrustDomainSpec `json:"spec"`
}

// ClusterFederatedTrustDomainSpec says where the bundle of a trust domain comes from.
type ClusterFederatedTrustDomainSpec struct {
	// ClassName selects a SPIRE controller manager. Hanse ignores it.
	ClassName string `json:"className,omitempty"`
	// TrustDomain whose bundle it is, such as partner.example.
	//
	// +kubebuilder:validation:MaxLength=255
	// +kubebuilder:validation:Pattern=`^[a-z0-9._-]+$`
	TrustDomain string `json:"trustDomain"`
	// BundleEndpointURL is where its bundle is served: an https URL without user and password. It may be empty where the bundle is kept by
	// hand (trustDomainBundle), or comes from a member of the mesh.
	//
	// +optional
	// +kubebuilder:validation:Pattern=`^(https://[^@/]+(/.*)?)?$`
	BundleEndpointURL string `json:"bundleEndpointURL"`
	// BundleEndpointProfile says how the endpoint proves that it is the one.
	//
	// +optional
	BundleEndpointProfile BundleEndpointProfile `json:"bundleEndpointProfile"`
	// TrustDomainBundle is the initial bundle, as SPIFFE JSON. The https_spiffe profile needs one to begin.
	TrustDomainBundle string `json:"trustDomainBundle,omitempty"`
	// Allow says which of its IDs may serve which services here; without it all may. SPIRE's kind does not have it: where SPIRE's own
	// definition is installed, the annotation hanse.mesh/allow has the same in JSON.
	Allow []FederationAllow `json:"allow,omitempty"`
}

// AllowAnnotation is spec.allow where the definition of the kind is SPIRE's own.
const AllowAnnotation = "hanse.mesh/allow"

// WebRootsAnnotation is who vouches for the bundle endpoint, as PEM, with the profile https_web: these certificates and no others. SPIRE's kind
// has nothing of the sort.
const WebRootsAnnotation = "hanse.mesh/web-roots"

// FederationAllow lets IDs of a foreign trust domain serve services.
type FederationAllow struct {
	// Services are names, namespace/name, in which "*" stands for any of either; empty is all.
	Services []string `json:"services,omitempty"`
	// SPIFFEIDs are patterns of that trust domain, of which one must match the ID of an endpoint.
	SPIFFEIDs []string `json:"spiffeIDs"`
}

// Allowed returns spec.allow, or what the annotation says instead.
func (f *ClusterFederatedTrustDomain) Allowed() ([]FederationAllow, error) {
	raw, ok := f.Annotations[AllowAnnotation]
	if !ok {
		return f.Spec.Allow, nil
	}
	if len(f.Spec.Allow) > 0 {
		return nil, errors.New("is given by spec.allow, too: remove one of them")
	}
	var rules []FederationAllow
	dec := json.NewDecoder(strings.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&rules); err != nil {
		return nil, fmt.Errorf("must be spec.allow in JSON, such as [{\"services\":[\"shop/*\"],\"spiffeIDs\":[\"spiffe://partner.example/ns/shop/**\"]}]: %w", err)
	}
	if dec.More() || len(rules) == 0 {
		return nil, errors.New("must be one JSON list with at least one rule")
	}
	return rules, nil
}

// Profiles of a bundle endpoint (SPIFFE Federation §5.2).
const (
	ProfileWeb    = "https_web"
	ProfileSPIFFE = "https_spiffe"
)

// BundleEndpointProfile says how a bundle endpoint is authenticated.
//
// +kubebuilder:validation:XValidation:rule="(has(self.type) && self.type == 'https_spiffe') == (has(self.endpointSPIFFEID) && size(self.endpointSPIFFEID) > 0)",message="endpointSPIFFEID goes with type https_spiffe, and type https_spiffe with endpointSPIFFEID"
type BundleEndpointProfile struct {
	// Type is https_web, by the certificate authorities of the web, or https_spiffe, by an SVID.
	//
	// +optional
	// +kubebuilder:validation:Enum="";https_web;https_spiffe
	Type string `json:"type"`
	// EndpointSPIFFEID is the SPIFFE ID of the endpoint, for https_spiffe.
	EndpointSPIFFEID string `json:"endpointSPIFFEID,omitempty"`
}
