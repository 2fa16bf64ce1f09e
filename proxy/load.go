package proxy

import "time"

// ClusterLoad is what a proxy has seen of one xDS cluster since the report before: what proxy/balance measures and
// proxy/xdsclient reports.
type ClusterLoad struct {
	Cluster   string // authority
	Interval  time.Duration
	Dropped   uint64 // requests refused by the circuit breaker
	Endpoints []EndpointLoad
}

// EndpointLoad is one endpoint's part of a ClusterLoad.
type EndpointLoad struct {
	Endpoint   *Endpoint
	Level      int
	Issued     uint64
	Succeeded  uint64
	Failed     uint64
	InProgress uint64 // now
	Retried    uint64 // tries that failed here and were tried again elsewhere
	P50, P99   time.Duration
	Health     Health
	Reason     string // of the health, in words
	Since      time.Time
	Events     []Event
}

// Health is an endpoint's, as one proxy sees it.
type Health string

// Healths.
const (
	Healthy Health = "healthy"
	Ejected Health = "ejected" // by its answers: outlier detection
	Dead    Health = "dead"    // no connection to it, or to any of its gateways
)

// Event is something that a drill's report tells.
type Event struct {
	Time     time.Time
	Cluster  string // authority
	Endpoint string // ID; the one whose failure or return caused a shift
	Kind     EventKind
	Detail   string
}

// EventKind says what happened.
type EventKind string

// Event kinds.
const (
	FirstFailure EventKind = "first_failure"
	EventEjected EventKind = "ejected"
	Shifted      EventKind = "shifted"  // a lower level carries more of the traffic
	Returned     EventKind = "returned" // an endpoint serves again, or the level of before carries all again
)
