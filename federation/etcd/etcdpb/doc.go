// Package etcdpb is the bookkeeping beside exports and imports: what a scope holds, and up to where it was mirrored.
package etcdpb
