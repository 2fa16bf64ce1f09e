// Package docs holds the documentation, and the tests that hold it true.
package docs
